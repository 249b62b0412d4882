"""Train an image classifier with self-feature regularization, with label smoothing or with neither.

    python examples/train_cifar.py                                       # digits, a minute
    python examples/train_cifar.py --dataset cifar100 --model resnet18   # from the Hub

Several processes, GPUs and mixed precision come with `accelerate launch examples/train_cifar.py`,
by `accelerate config` or its flags. Two processes on the CPU (`--cpu --num_processes 2` would start
only one):

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/train_cifar.py
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_cifar.py

A run that was killed continues with `--resume` and otherwise the same command line, after its last
whole epoch; on the CPU it ends with the same weights as an undisturbed run. If it was killed within
its first epoch, `--resume` starts it again, so a job that is queued again can always pass it. The
run keeps its two newest checkpoints with checksums of all files: a damaged one is named and skipped.
Resume only your own checkpoints: Accelerate reads parts of them with pickle, and a checkpoint
from somebody else can execute code. The result of a run is that of its last epoch, never of its best.
"""

import argparse
import ast
import math
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed
from cifar_data import IMAGE_SIZE, SOURCES, ImageSet, Splits, load_splits
from cifar_metrics import ClassificationMetric
from cifar_models import build_model
from epoch_run import EpochTrainer, build_accelerator, run_epochs
from learning_rate import warmup_then_cosine
from run_folder import Record
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, StackDataset

import sfr


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line `argv` says; return the trained, plain model."""
    args = parse_arguments(argv)
    accelerator = build_accelerator(args)
    model = train(args, accelerator, Trainer)
    accelerator.end_training()
    return model


def train(args: argparse.Namespace, accelerator: Accelerator, trainer_class: "type[Trainer]") -> nn.Module:
    """Go through one whole run, from its data set to its folder; return the trained, plain model."""

    def load() -> Splits:
        return load_splits(args.dataset, args.data_dir, args.limit, args.val_fraction)

    trainer = run_epochs(trainer_class, load, args, accelerator, {"sfr": sfr_settings(args)})
    model = accelerator.unwrap_model(trainer.model)
    return model.unwrap() if isinstance(model, sfr.SFRWrapper) else model


class Trainer(EpochTrainer):
    """What a training step needs, prepared for the devices of this run."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, splits: Splits) -> None:
        super().__init__(args, accelerator, splits)
        self.model_name: str = args.model
        self.train_loader = self._loader(splits.train, args, shuffle=True)
        self.test_loader = self._loader(splits.test, args, shuffle=False)
        self.curve_loader, self.curve_part = self.test_loader, "test"
        if splits.validation is not None:
            self.curve_loader = self._loader(splits.validation, args, shuffle=False)
            self.curve_part = "val"

        self.steps_per_epoch = len(self.train_loader)
        whole_run = args.epochs * self.steps_per_epoch
        self.total_steps = min(whole_run, args.max_steps or whole_run)
        self.last_epoch = math.ceil(self.total_steps / self.steps_per_epoch)

        set_seed(args.seed)  # the same initial weights in all processes ...
        model, self.criterion = self._build(args)
        set_seed(args.seed, device_specific=True)  # ... but crops and flips of their own
        optimizer = SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
        self.model, self.optimizer, self.schedule = accelerator.prepare(
            model, optimizer, warmup_then_cosine(optimizer, whole_run)
        )
        self.networks = [self.model]

    def _build(self, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
        return build_model_and_criterion(args, self.accelerator.device)

    def _loader(self, images: ImageSet, args: argparse.Namespace, shuffle: bool) -> Any:
        """Where we train (`shuffle`) only whole batches, so that one process and several take the same steps, and with
        each image its number."""
        loader: DataLoader[Any] = DataLoader(
            StackDataset(images, range(len(images))) if shuffle else images,  # type: ignore[arg-type]
            args.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            collate_fn=images.collate_numbered if shuffle else images.collate,
            num_workers=args.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def train_epoch(self, epoch: int) -> Record:
        """Train for one epoch, or for as much of it as `--max-steps` leaves."""
        steps_before = (epoch - 1) * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.total_steps - steps_before)
        lr = self.schedule.get_last_lr()[0]
        start = time.perf_counter()
        parts = self.train_steps(epoch, steps)
        if isinstance(self.criterion, sfr.SFRLoss) and self.criterion.config.update == "epoch":
            self.criterion.end_epoch()
        means = {f"train_{name}": self.accelerator.reduce(part, "mean").item() for name, part in parts.items()}
        seconds = time.perf_counter() - start
        return {
            "step": steps_before + steps,
            "lr": lr,
            **means,
            "seconds": round(seconds, 3),
            "images_per_second": round(steps * self.batch_size / seconds, 1),
        }

    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        loss = self._loss(*batch)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        parts = {"loss": loss.detach()}
        last = getattr(self.criterion, "last", None)  # SFRLoss keeps the parts of its last loss
        if last is not None:
            parts |= {"label_loss": last.label, "feature_loss": last.feature}
        return parts

    def _loss(self, images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        numbers = {"index": index} if isinstance(self.criterion, sfr.SFRLoss) else {}  # for smoothing=past
        return self.criterion(self.model(images), labels, **numbers)

    def weights(self) -> dict[str, Tensor]:
        """The weights to be kept of the run, gathered from all processes."""
        return self.accelerator.get_state_dict(self.model)

    def description(self) -> str:
        return f"{self.model_name}: {sum(parameter.numel() for parameter in self.model.parameters()):,} parameters"

    def evaluate_curve(self) -> Record:
        """Metrics of the held-out part, or of the test set where nothing is held out."""
        return self.evaluate(self.curve_loader, self.curve_part)

    def evaluate_end(self) -> Record:
        """Metrics of the test set."""
        return self.evaluate(self.test_loader, "test")

    @torch.no_grad()
    def evaluate(self, loader: Any, part: str) -> Record:
        """Metrics over all processes, the padding of the last batch left out."""
        self.model.eval()
        metric = ClassificationMetric(keep_in_memory=True)
        for images, labels in loader:
            gathered = self.accelerator.gather_for_metrics((self.model(images).float(), labels))
            logits, labels = (tensor.cpu().numpy() for tensor in gathered)
            metric.add_batch(predictions=logits, references=labels)
        return {f"{part}_{name}": value for name, value in (metric.compute() or {}).items()}


def sfr_settings(args: argparse.Namespace) -> Record | None:
    """Return all fields of the method's configuration, None for another method."""
    try:
        return sfr.SFRConfig(**dict(args.sfr)).to_dict() if args.method == "sfr" else None
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--sfr: {error}") from error


def build_model_and_criterion(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Module]:
    model = build_model(args.model, SOURCES[args.dataset].num_classes)
    if args.init:
        load_backbone(model, args.init)
    model = model.to(memory_format=torch.channels_last).to(device)
    if args.method == "sfr":
        image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        try:
            wrapped = sfr.SFRWrapper(model, example_input=image, **dict(args.sfr))
        except ValueError as error:
            raise SystemExit(f"--model {args.model}: {error}") from error
        return wrapped, sfr.SFRLoss(wrapped).to(device)
    smoothing = 0.1 if args.method == "label-smoothing" else 0.0
    return model, nn.CrossEntropyLoss(label_smoothing=smoothing)


def load_backbone(model: nn.Module, file: str) -> None:
    """Load the weights in `file`, without those of a classifier that has another number of classes."""
    weights, own = read_weights(file, "--init"), model.state_dict()
    if weights.keys() != own.keys():
        strange = sorted(weights.keys() ^ own.keys())
        raise SystemExit(
            f"--init: {file} holds the weights of another model; {len(strange)} names differ: {strange[:4]}"
        )
    model.load_state_dict(
        {name: own[name] if value.shape != own[name].shape else value for name, value in weights.items()}
    )


def read_weights(file: str, option: str) -> dict[str, Tensor]:
    """Return the state dict in `file`; nothing but tensors is read."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise SystemExit(f"{option}: {file} is not a readable file of weights: {reason}") from error
    if not isinstance(weights, dict):
        raise SystemExit(f"{option}: {file} holds no weights, but a {type(weights).__name__}")
    return weights


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(SOURCES), default="digits", help="digits needs no download")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    add("--model", default="resnet20", help="resnet20, wrn_16_2, any torchvision or timm name")
    add("--init", metavar="FILE", help="start from the weights in this model.pt")
    add("--method", choices=["sfr", "label-smoothing", "vanilla"], default="sfr")
    add("--sfr", nargs="+", type=key_value, default=[], metavar="KEY=VALUE", help="SFRConfig fields")
    add("--epochs", type=positive, help="default 10 for digits, 200 for CIFAR")
    add("--batch-size", type=positive, default=128, help="global, split over the processes")
    add("--lr", type=float, default=0.1, help="peak; not scaled by the number of processes")
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    add("--val-fraction", type=fraction, default=0.0, help="hold out this part of the training set")
    add("--max-steps", type=positive, help="stop after so many optimizer steps")
    add("--limit", type=positive, metavar="N", help="first N training and test images only")
    add("--num-workers", type=int, default=0, help="loading processes per training process")
    add("--output-dir", type=Path, help="default runs/DATASET-MODEL-METHOD-seedSEED, if taken with -2, -3 ...")
    add("--resume", action="store_true", help="continue the run in --output-dir, default the newest; or start one")
    add("--tracker", choices=["none", *LOGGER_TYPE_TO_CLASS], default="none")
    args = parser.parse_args(argv)
    if args.sfr and args.method != "sfr":
        parser.error("--sfr needs --method sfr")
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir is for CIFAR: the digits come with scikit-learn")
    args.epochs = args.epochs or SOURCES[args.dataset].epochs
    args.default_output_dir = Path("runs", f"{args.dataset}-{args.model}-{args.method}-seed{args.seed}")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {value}")
    return value


def key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    main()
