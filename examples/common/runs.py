"""What the examples share around their training loops: folder, head, progress, metrics, checkpoints, resuming."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import KwargsHandler
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset
from tqdm.auto import tqdm

from .checkpoint_files import checksum
from .data import ImageSet, Labelled, Splits
from .run_folder import Record, RunFolder, claimed

SHOW_LOSS_EVERY = 10  # steps, because reading a loss makes the device wait
ELSEWHERE = (
    "data_dir",
    "output_dir",
    "default_output_dir",
    "feature_cache",
    "resume",
    "tracker",
)  # what may differ between the parts of a resumed run

OF_WEIGHTS = ("init", "teacher_weights")  # files that count by what they hold, wherever they lie


class Run:
    """One run of an example; :func:`opened` makes it."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, folder: RunFolder, config: Record) -> None:
        self.args, self.accelerator, self.folder, self.config = args, accelerator, folder, config

    def load(self, load: Callable[[], Splits]) -> Splits:
        """Load the data, in one process of each machine first, and check the batch size against them."""
        with self.accelerator.local_main_process_first():  # it downloads, the others read its cache
            self.splits = load()
        size, processes, images = self.args.batch_size, self.accelerator.num_processes, len(self.splits.train)
        if size % processes:
            raise SystemExit(f"--batch-size {size} cannot be split over {processes} processes")
        if size > images:
            raise SystemExit(f"--batch-size {size} is more than the {images} training images")
        return self.splits

    def loaders(self) -> tuple[Any, Any, Any, str]:
        """The batches to train on, those of the test, and those of the curve with its name: "val", of the images held
        out, or the test's if there are none."""
        train, test = self.loader(self.splits.train, shuffle=True), self.loader(self.splits.test)
        held_out = self.splits.validation
        return (train, test, test, "test") if held_out is None else (train, test, self.loader(held_out), "val")

    def loader(self, images: ImageSet, shuffle: bool = False) -> Any:
        """Batches of images and labels. Where we train (`shuffle`) only whole ones, so that one process and several
        take the same steps, and with each image its number."""
        loader: DataLoader[Any] = DataLoader(
            StackDataset(images, range(len(images))) if shuffle else images,  # type: ignore[arg-type]
            self.args.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            collate_fn=images.collate_numbered if shuffle else images.collate,
            num_workers=self.args.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def pixels(self, part: Labelled, shuffle: bool = False) -> Any:
        """Batches of pixels as they are and labels; whole ones only where we train."""
        images = TensorDataset(part.pixels, part.labels)
        return self.accelerator.prepare(DataLoader(images, self.args.batch_size, shuffle=shuffle, drop_last=shuffle))

    def epochs(self, loader: Any, steps: int, criterion: nn.Module, description: str) -> Iterator["Epoch"]:
        """Load the checkpoint, if the run has one, say what is trained, and yield the epochs that are left.

        Args:
            loader: the batches of an epoch.
            steps: of the whole run; the last epoch may be cut short.
            criterion: its state is kept with the checkpoints.
            description: what is trained, for the head of the run.
        """
        self.criterion, last = criterion, math.ceil(steps / len(loader))
        self._restore()
        self._announce(last, description)
        if self.accelerator.is_main_process:
            self.folder.start()
        for number in range(self.folder.epochs_done + 1, last + 1):
            yield Epoch(self, loader, number, last, min(len(loader), steps - (number - 1) * len(loader)))

    def _restore(self) -> None:
        done = self.folder.epochs_done
        if self.args.resume:
            nothing = f"{self.folder.path} holds no checkpoint yet: starting at epoch 1"
            self.accelerator.print(f"resuming after epoch {done}" if done else nothing)
        self.folder.restore(self.accelerator, self.criterion)

    def _announce(self, last_epoch: int, description: str) -> None:
        config, splits = self.config, self.splits
        self.accelerator.init_trackers("sfr", {name: str(value) for name, value in config.items()})
        self.accelerator.print(
            f"processes {config['processes']}, device {config['device']}, precision {config['precision']}\n"
            f"{config['dataset']}: {len(splits.train)} training images, "
            f"{len(splits.validation or ())} held out, {len(splits.test)} test images\n"
            f"{description}\n"
            f"method {config['method']}, {last_epoch} epochs, into {self.folder.path}"
        )

    def keep(self, record: Record) -> None:
        """Print, log and write what an epoch has brought, and keep a checkpoint of it."""
        self.accelerator.print(described(record))
        self.accelerator.log(record, step=record["epoch"])
        if self.accelerator.is_main_process:
            self.folder.append(record)
        self.folder.save_checkpoint(self.accelerator, record["epoch"], self.criterion)

    def finish(self, weights: dict[str, Tensor], end: Record) -> None:
        """Write the weights, and what was measured at the end."""
        if self.accelerator.is_main_process:
            self.folder.finish(weights, {**self.folder.history()[-1], **end})
        self.accelerator.print(f"after the last epoch: {described(end)}\nwrote {self.folder.path}")


class Epoch:
    """The batches of one epoch, with a progress bar, and the means of what is noted of its steps."""

    def __init__(self, run: Run, loader: Any, number: int, last: int, steps: int) -> None:
        self.number, self.steps = number, steps
        self.last_step = (number - 1) * len(loader) + steps  # counted from the first of the run
        self._run, self._loader, self._last = run, loader, last
        self._totals: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Any]:
        self._start = time.perf_counter()
        self._loader.set_epoch(self.number)  # the order of the images depends on seed and epoch only
        stop = self.steps if self.steps < len(self._loader) else None  # a loader read to its end tells Accelerate so
        with self._progress_bar() as bar:
            for step, batch in enumerate(islice(self._loader, stop), start=1):
                yield batch
                bar.update(self._run.args.batch_size)
                if step % SHOW_LOSS_EVERY == 0:
                    bar.set_postfix({name: f"{total / step:.3f}" for name, total in self._totals.items()})

    def note(self, **parts: Tensor) -> None:
        """Add the parts of the loss of a step."""
        for name, part in parts.items():
            self._totals[name] = self._totals[name] + part.detach() if name in self._totals else part.detach()

    def means(self) -> Record:
        """Return the means of all that was noted, over all processes."""
        return {
            name: self._run.accelerator.reduce(total / self.steps, "mean").item()
            for name, total in self._totals.items()
        }

    def speed(self) -> Record:
        """Return the seconds since the first step, and the images a second."""
        seconds = time.perf_counter() - self._start
        images = self.steps * self._run.args.batch_size
        return {"seconds": round(seconds, 3), "images_per_second": round(images / seconds, 1)}

    def _progress_bar(self) -> "tqdm[None]":
        return tqdm(
            desc=f"epoch {self.number}/{self._last}",
            total=self.steps * self._run.args.batch_size,
            unit=" images",
            leave=False,
            mininterval=1.0,
            disable=not self._run.accelerator.is_main_process,
        )


@contextmanager
def opened(args: argparse.Namespace, accelerator: Accelerator, method: Record) -> Iterator[Run]:
    """Hold the folder of a run while it lasts.

    Args:
        args: the command line; its `output_dir` becomes the folder of the run.
        accelerator: see :func:`build_accelerator`.
        method: what decides the result besides the command line, and may not change when a run is resumed.
    """
    config = run_config(args, accelerator) | method
    with claimed(args.output_dir, args.default_output_dir, config, args.resume) as folder:
        args.output_dir = folder.path
        accelerator.project_configuration.logging_dir = str(folder.path)
        yield Run(args, accelerator, folder, config)


def average_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Each process has seen its own part of the batches: make their BatchNorm statistics one."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))


def build_accelerator(args: argparse.Namespace, *handlers: KwargsHandler) -> Accelerator:
    if args.tracker != "none" and args.tracker not in map(str, get_available_trackers()):
        raise SystemExit(f"--tracker {args.tracker}: its package is not installed")
    return Accelerator(
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=args.output_dir or args.default_output_dir,  # of the tracker, until the run has its folder
        kwargs_handlers=list(handlers),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed),
    )


def run_config(args: argparse.Namespace, accelerator: Accelerator) -> Record:
    """The command line and the launch, as far as they decide the result of a run: see `--resume`."""
    given = {name: value for name, value in vars(args).items() if name not in ELSEWHERE}
    files = {name: Path(given[name]) for name in OF_WEIGHTS if given.get(name)}
    contents = {name: f"sha256:{checksum(file)}" for name, file in files.items() if file.is_file()}
    return {
        **given,
        **contents,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
    }


def described(record: Record) -> str:
    shown = {name: value for name, value in record.items() if name not in ("step", "lr", "seconds")}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
