"""The folder of one run: its configuration, its checkpoints, a line of metrics per epoch, curves, weights."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from .atomic_file import replace_file, replace_text, sync_folder
from .checkpoint_files import checkpoints, damage, epoch_of, remove, seal
from .folder_lock import FolderLock

Record = dict[str, Any]
KEPT = 2  # checkpoints: if the newest is damaged, the one before is there
NOT_RESTORED = 20210307  # a seed that no run uses


class RunFolder:
    """`config.json`, `checkpoint-NNNN/`, `metrics.jsonl`, `summary.json`, `curves.png` and `model.pt` of a run.

    Args:
        path: the folder, held by this run alone; see :func:`claimed`.
        checkpoint: the one to resume from, None to start at the first epoch.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"

    @property
    def epochs_done(self) -> int:
        return epoch_of(self.checkpoint) if self.checkpoint else 0

    def start(self) -> None:
        """Put the metrics back to the epochs that the checkpoint holds."""
        replace_text(self.metrics_file, (self.checkpoint / "metrics.jsonl").read_text() if self.checkpoint else "")

    def append(self, record: Record) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[Record]:
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def save_checkpoint(self, accelerator: Accelerator, epoch: int, criterion: nn.Module) -> None:
        """Keep the state of all processes after `epoch`, and only then drop the oldest checkpoint."""
        partial = self.path / "checkpoint.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._check_complete(partial, accelerator.num_processes)
            torch.save(criterion.state_dict(), partial / "criterion.pt")
            shutil.copyfile(self.metrics_file, partial / "metrics.jsonl")
            seal(partial)
            self._put_in_place(partial, self.path / f"checkpoint-{epoch:04d}")

    def _check_complete(self, partial: Path, processes: int) -> None:
        found = len(list(partial.glob("random_states_*.pkl")))
        if found != processes:
            raise SystemExit(
                f"--output-dir: {self.path} received the states of {found} of {processes} processes; "
                f"it must be on a file system that all machines share"
            )

    def _put_in_place(self, partial: Path, checkpoint: Path) -> None:
        remove(checkpoint)  # a damaged one that was skipped
        partial.rename(checkpoint)
        sync_folder(self.path)
        for old in checkpoints(self.path)[:-KEPT]:
            remove(old)

    def restore(self, accelerator: Accelerator, criterion: nn.Module) -> None:
        """Load the checkpoint into all that `accelerator` has prepared, and into the criterion."""
        if self.checkpoint is None:
            return
        torch.manual_seed(NOT_RESTORED)
        before = torch.get_rng_state()
        accelerator.load_state(str(self.checkpoint))
        if torch.equal(torch.get_rng_state(), before):  # Accelerate goes on without them and does not say so
            raise SystemExit(f"--resume: the random states in {self.checkpoint} cannot be read by these versions")
        state = torch.load(self.checkpoint / "criterion.pt", map_location="cpu", weights_only=True)
        criterion.load_state_dict(state)

    def finish(self, weights: dict[str, Tensor], summary: Record) -> None:
        on_cpu = {name: value.cpu() for name, value in weights.items()}
        replace_file(self.path / "model.pt", lambda partial: torch.save(on_cpu, partial))
        curves(self.history()).savefig(self.path / "curves.png", dpi=120)
        replace_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


@contextmanager
def claimed(chosen: Path | None, default: Path, config: Record, resume: bool) -> Iterator[RunFolder]:
    """Hold a folder for this run alone while it lasts; claim it before anything that takes long.

    The main process claims it and tells the others: build the Accelerator before. The lock ends with the process, so a
    killed run is never in the way of its resumption.

    Args:
        chosen: the folder, or None for `default`; where that holds a run, `default`-2, `default`-3 and so on.
        default: see `chosen`; with `resume`, the newest of these folders.
        config: what decides the result of the run, written to `config.json`.
        resume: continue the run in the folder; where there is none yet, start one.

    Raises:
        SystemExit: the folder is in use, cannot be written, holds another run, or has only damaged checkpoints.
    """
    main = PartialState().is_main_process
    lock: FolderLock | None = None
    answer: list[Any] = [None, None, None]
    if main:
        try:
            lock = claim(chosen, default, resume)
            answer = [lock.folder, prepare(lock.folder, config, resume), None]
        except SystemExit as refusal:
            answer = [None, None, str(refusal)]
    path, checkpoint, refused = broadcast_object_list(answer)
    try:
        if refused:
            raise SystemExit(refused if main else 1)
        with withdrawn_unless_begun(path, main):
            yield RunFolder(path, checkpoint)
    finally:
        if lock:
            lock.release()


def claim(chosen: Path | None, default: Path, resume: bool) -> FolderLock:
    """Lock the folder `chosen`, or of those called `default` the newest (`resume`) or the first that is free."""
    newest = newest_number(default)
    if chosen is None and not resume:
        for number in count(newest + 1):
            lock = locked(numbered(default, number))
            if lock and not (lock.folder / "config.json").exists():
                return lock
            if lock:
                lock.release()
    folder = chosen or numbered(default, max(newest, 1))
    lock = locked(folder)
    if lock is None:
        holder = FolderLock(folder).holder()
        raise SystemExit(f"{folder} is in use by {holder}: wait for the end of that run or pass another --output-dir")
    return lock


def numbered(default: Path, number: int) -> Path:
    return default if number == 1 else default.with_name(f"{default.name}-{number}")


def newest_number(default: Path) -> int:
    """Return the highest number among the folders called `default` that hold a run, 0 if none does."""
    names = (file.parent.name for file in default.parent.glob("*/config.json"))
    matches = (re.fullmatch(rf"{re.escape(default.name)}(?:-(\d+))?", name) for name in names)
    return max((int(match[1] or 1) for match in matches if match), default=0)


def locked(folder: Path) -> FolderLock | None:
    """Return the lock of a folder, which is made if it is missing; None if another run holds it."""
    lock = FolderLock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock if lock.acquire() else None
    except OSError as error:
        raise SystemExit(f"--output-dir: cannot write to {folder}: {error}") from error


def prepare(path: Path, config: Record, resume: bool) -> Path | None:
    """Say what stands in the way of a run in the folder, else write its configuration.

    Returns the checkpoint to resume from, None to start at the first epoch.
    """
    file, checkpoint = path / "config.json", None
    if file.exists():
        if not resume:
            raise SystemExit(f"{path} holds a run: pass --resume or another --output-dir")
        check_same(file, config)
        checkpoint = newest_sound(path)
    if checkpoint is None:
        check_nothing_to_lose(path)
    replace_text(file, json.dumps(config, indent=2) + "\n")
    return checkpoint


def check_same(file: Path, config: Record) -> None:
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"--resume: {file} is damaged ({error}); pass another --output-dir") from error
    now = json.loads(json.dumps(config))  # tuples become lists, as they did in the file
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise SystemExit(f"--resume: another configuration than {file.parent}'s: {'; '.join(changed)}")


def newest_sound(path: Path) -> Path | None:
    """Return the newest checkpoint whose files are what was written; None if there is no checkpoint at all."""
    faults = []
    for checkpoint in reversed(checkpoints(path)):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(fault)
        print(f"--resume: in {path}, {fault}; looking for the checkpoint before")
    if faults:
        raise SystemExit(
            f"--resume: {path} holds no sound checkpoint: {'; '.join(faults)}. "
            f"Start again with another --output-dir, or delete the folder"
        )
    return None


def check_nothing_to_lose(path: Path) -> None:
    """A run that starts at the first epoch overwrites: refuse where that would cost more than an epoch."""
    metrics = path / "metrics.jsonl"
    epochs = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    if epochs > 1 or checkpoints(path) or (path / "summary.json").exists():
        raise SystemExit(
            f"{path} holds a run without its configuration or its checkpoints, which cannot be resumed: "
            f"pass another --output-dir, or delete the folder"
        )


@contextmanager
def withdrawn_unless_begun(path: Path, main: bool) -> Iterator[None]:
    """If the run ends in an error before its first step, leave no run behind."""
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt):
        if main and not any(path.rglob("metrics.jsonl")):
            (path / "config.json").unlink(missing_ok=True)
        raise


def curves(history: list[Record]) -> Figure:
    """Draw losses and, where there are any, accuracies over epochs, side by side."""
    names = [name for name in history[0] if name not in ("epoch", "step")]
    panels = {
        "loss": [name for name in names if "loss" in name],
        "share": [name for name in names if name.endswith(("accuracy", "top5"))],
    }
    drawn = {label: of_panel for label, of_panel in panels.items() if of_panel}
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axes, (label, of_panel) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        draw(axes, history, of_panel, label)
    return figure


def draw(axes: Axes, history: list[Record], names: list[str], label: str) -> None:
    epochs = [record["epoch"] for record in history]
    for name in names:
        axes.plot(epochs, [record[name] for record in history], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
