"""The folder of one run: its configuration, its checkpoint, a line of metrics per epoch, curves, weights."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from whole_file import replace_file

Record = dict[str, Any]


class RunFolder:
    """`config.json`, `checkpoint-NNNN/`, `metrics.jsonl`, `summary.json`, `curves.png` and `model.pt` of a run.

    What a killed run leaves can always be resumed: files are replaced and checkpoints renamed as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"

    def check(self, config: Record, resume: bool) -> int:
        """Say what stands in the way of the run, before it starts; return the number of epochs done."""
        self._check_writable()
        started = self.config_file.exists()
        if not resume:
            if started:
                raise SystemExit(f"{self.path} holds a run: pass --resume or another --output-dir")
            return 0
        if not started:
            raise SystemExit(f"--resume: {self.path} holds no run")
        self._check_same(config)
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            raise SystemExit(
                f"--resume: {self.path} holds no checkpoint, its run ended within the first epoch; "
                f"delete it and start again without --resume"
            )
        return int(checkpoint.name.split("-")[1])

    def start(self, config: Record, epochs_done: int) -> None:
        """Write the configuration; cut the metrics back to the epochs that the checkpoint holds."""
        replace_text(self.config_file, json.dumps(config, indent=2) + "\n")
        replace_text(self.metrics_file, "".join(self._metric_lines()[:epochs_done]))

    def append(self, record: Record) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[Record]:
        return [json.loads(line) for line in self._metric_lines()]

    def save_checkpoint(self, accelerator: Accelerator, epoch: int) -> None:
        """Keep the state of all processes after `epoch`, and only then drop the one before."""
        partial = self.path / "checkpoint.partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            before = self.checkpoints()
            partial.rename(self.path / f"checkpoint-{epoch:04d}")
            for checkpoint in before:
                shutil.rmtree(checkpoint)

    def checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("checkpoint-*"))

    def last_checkpoint(self) -> Path | None:
        return max(self.checkpoints(), default=None)

    def finish(self, weights: dict[str, Tensor], summary: Record) -> None:
        torch.save({name: value.cpu() for name, value in weights.items()}, self.path / "model.pt")
        replace_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        plot_curves(self.history(), self.path / "curves.png")

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise SystemExit(f"--output-dir: cannot write to {self.path}: {error}") from error

    def _check_same(self, config: Record) -> None:
        before = json.loads(self.config_file.read_text())
        now = json.loads(json.dumps(config))  # tuples become lists, as they did in the file
        changed = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise SystemExit(f"--resume: another configuration than {self.path}'s: {'; '.join(changed)}")

    def _metric_lines(self) -> list[str]:
        if not self.metrics_file.exists():
            return []
        return self.metrics_file.read_text().splitlines(keepends=True)


def replace_text(file: Path, text: str) -> None:
    replace_file(file, lambda partial: partial.write_text(text))


def plot_curves(history: list[Record], file: Path) -> None:
    """Losses on the left, accuracies on the right, over epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    names = [name for name in history[0] if name not in ("epoch", "step")]
    draw(losses, history, [name for name in names if "loss" in name], "loss")
    draw(accuracies, history, [name for name in names if name.endswith(("accuracy", "top5"))], "share")
    figure.savefig(file, dpi=120)


def draw(axes: Axes, history: list[Record], names: list[str], label: str) -> None:
    epochs = [record["epoch"] for record in history]
    for name in names:
        axes.plot(epochs, [record[name] for record in history], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
