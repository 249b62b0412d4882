"""A run of a trainer, epoch by epoch: into its folder, with a curve, checkpoints, and on from where it was killed."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import KwargsHandler
from cifar_data import Splits
from run_folder import Record, RunFolder, claimed
from torch import Tensor, nn
from tqdm.auto import tqdm

SHOW_LOSS_EVERY = 10  # steps, because reading a loss makes the device wait
ELSEWHERE = (
    "data_dir",
    "output_dir",
    "default_output_dir",
    "resume",
    "tracker",
)  # what may differ between the parts of a resumed run


class EpochTrainer(ABC):
    """What a run asks of a trainer, and how the steps of an epoch are taken."""

    train_loader: Any
    networks: list[nn.Module]  # all that is trained
    criterion: nn.Module
    last_epoch: int

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, splits: Splits) -> None:
        processes, images = accelerator.num_processes, len(splits.train)
        if args.batch_size % processes:
            raise SystemExit(f"--batch-size {args.batch_size} cannot be split over {processes} processes")
        if args.batch_size > images:
            raise SystemExit(f"--batch-size {args.batch_size} is more than the {images} training images")
        self.accelerator = accelerator
        self.batch_size: int = args.batch_size

    @abstractmethod
    def description(self) -> str:
        """What is trained, for the head of the run."""

    @abstractmethod
    def train_epoch(self, epoch: int) -> Record:
        """Train for one epoch; return what its line of metrics says of the training."""

    @abstractmethod
    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        """Take one step; return the parts of the loss."""

    @abstractmethod
    def evaluate_curve(self) -> Record:
        """What is measured after each epoch."""

    @abstractmethod
    def evaluate_end(self) -> Record:
        """What is measured after the last epoch."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights to be kept of the run."""

    def train_steps(self, epoch: int, steps: int) -> dict[str, Tensor]:
        """Take the first `steps` steps of an epoch; return the means of the parts of the loss in this process."""
        self.train_loader.set_epoch(epoch)  # the order of the images depends on seed and epoch only
        for network in self.networks:
            network.train()
        totals: dict[str, Tensor] = {}
        stop = steps if steps < len(self.train_loader) else None  # a loader read to its end tells Accelerate so
        with self._progress_bar(epoch, steps) as bar:
            for step, batch in enumerate(islice(self.train_loader, stop), start=1):
                for name, part in self._step(*batch).items():
                    totals[name] = totals[name] + part if name in totals else part
                bar.update(self.batch_size)
                if step % SHOW_LOSS_EVERY == 0:
                    bar.set_postfix({name: f"{total / step:.3f}" for name, total in totals.items()})
        self._average_buffers()
        return {name: total / steps for name, total in totals.items()}

    def _progress_bar(self, epoch: int, steps: int) -> "tqdm[None]":
        return tqdm(
            desc=f"epoch {epoch}/{self.last_epoch}",
            total=steps * self.batch_size,
            unit=" images",
            leave=False,
            mininterval=1.0,
            disable=not self.accelerator.is_main_process,
        )

    def _average_buffers(self) -> None:
        """Each process has seen its own part of the batches: make their BatchNorm statistics one."""
        for buffer in (buffer for network in self.networks for buffer in network.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))


AnyTrainer = TypeVar("AnyTrainer", bound=EpochTrainer)


def run_epochs(
    build: Callable[[argparse.Namespace, Accelerator, Splits], AnyTrainer],
    load: Callable[[], Splits],
    args: argparse.Namespace,
    accelerator: Accelerator,
    method: Record,
) -> AnyTrainer:
    """Go through one whole run, from its data set to its folder; return the trainer.

    Args:
        build: makes the trainer, once the data is there.
        load: loads the data, in one process of each machine first.
        args: the command line; its `output_dir` becomes the folder of the run.
        accelerator: see :func:`build_accelerator`.
        method: what decides the result besides the command line, and may not change when a run is resumed.
    """
    config = run_config(args, accelerator) | method
    with claimed(args.output_dir, args.default_output_dir, config, args.resume) as folder:
        args.output_dir = folder.path
        accelerator.project_configuration.logging_dir = str(folder.path)
        with accelerator.local_main_process_first():  # it downloads, the others read its cache
            splits = load()
        trainer = build(args, accelerator, splits)
        if args.resume:
            accelerator.print(
                f"resuming after epoch {folder.epochs_done}"
                if folder.epochs_done
                else f"{folder.path} holds no checkpoint yet: starting at epoch 1"
            )
        folder.restore(accelerator, trainer.criterion)

        accelerator.init_trackers("sfr", {name: str(value) for name, value in config.items()})
        accelerator.print(
            f"processes {config['processes']}, device {config['device']}, precision {config['precision']}\n"
            f"{config['dataset']}: {len(splits.train)} training images, "
            f"{len(splits.validation or ())} held out, {len(splits.test)} test images\n"
            f"{trainer.description()}\n"
            f"method {config['method']}, {trainer.last_epoch} epochs, into {folder.path}"
        )
        train_and_finish(trainer, folder, accelerator)
    return trainer


def train_and_finish(trainer: EpochTrainer, folder: RunFolder, accelerator: Accelerator) -> None:
    """Train from the epoch after the folder's checkpoint to the last one; write what the run has brought."""
    if accelerator.is_main_process:
        folder.start()
    for epoch in range(folder.epochs_done + 1, trainer.last_epoch + 1):
        record = {"epoch": epoch, **trainer.train_epoch(epoch), **trainer.evaluate_curve()}
        accelerator.print(describe(record))
        accelerator.log(record, step=epoch)
        if accelerator.is_main_process:
            folder.append(record)
        folder.save_checkpoint(accelerator, epoch, trainer.criterion)

    end = trainer.evaluate_end()
    weights = trainer.weights()
    if accelerator.is_main_process:
        folder.finish(weights, {**folder.history()[-1], **end})
    accelerator.print(f"after the last epoch: {describe(end)}\nwrote {folder.path}")


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
    return {
        **{name: value for name, value in vars(args).items() if name not in ELSEWHERE},
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
    }


def describe(record: Record) -> str:
    shown = {name: value for name, value in record.items() if name not in ("step", "lr", "seconds")}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
