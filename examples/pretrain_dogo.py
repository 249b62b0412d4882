"""Pre-train two networks side by side without labels: DoGo, or each on its own as the baseline.

    python examples/pretrain_dogo.py                                        # digits, a minute
    python examples/pretrain_dogo.py --method alone                         # the baseline
    python examples/pretrain_dogo.py --dataset cifar10 --data-dir DIR       # from local Parquet

Both networks of `--method alone` have the initial weights, images and views that they have with `--method dogo`; only
the mutual term is missing. After each epoch the labels are used for a nearest-neighbour vote among some images, to
draw a curve, and after the last epoch for a linear classifier on all features of the frozen encoders.

Several processes, GPUs, mixed precision and `--resume` are as in train_cifar.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed
from cifar_data import SOURCES, Labelled, Splits, load_splits
from cifar_models import build_model
from epoch_run import EpochTrainer, build_accelerator, run_epochs
from frozen_features import knn_accuracy, linear_accuracy
from run_folder import Record
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import normalize
from train_cifar import positive
from two_views import augment

from sfr.pretrain import DoGoLoss, TwoViewNetwork

NAMES = ("first", "second")
CURVE_IMAGES = 2000  # for the curve only: at most so many training and test images
DEFAULTS: dict[str, dict[str, Any]] = {
    # 8x8 digits lose nothing in views of 16x16, but much of their strokes in small crops.
    "digits": {"epochs": 10, "batch_size": 128, "image_size": 16, "smallest_crop": 0.5},
    "cifar10": {"epochs": 200, "batch_size": 256, "image_size": 32, "smallest_crop": 0.2},
    "cifar100": {"epochs": 200, "batch_size": 256, "image_size": 32, "smallest_crop": 0.2},
}


def main(argv: Sequence[str] | None = None) -> "PairTrainer":
    """Pre-train as the command line `argv` says; return the trainer, which holds networks and data."""
    args = parse_arguments(argv)
    accelerator = build_accelerator(args)

    def load() -> Splits:
        return load_splits(args.dataset, args.data_dir, args.limit)

    trainer = run_epochs(PairTrainer, load, args, accelerator, {})
    accelerator.end_training()
    return trainer


class PairTrainer(EpochTrainer):
    """Two networks, an optimizer and views for each, prepared for the devices of this run."""

    criterion: DoGoLoss

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, splits: Splits) -> None:
        super().__init__(args, accelerator, splits)
        self.args, self.source, self.last_epoch = args, SOURCES[args.dataset], args.epochs
        parts = splits.train.data, splits.test.data
        self.train_loader = self._loader(parts[0], shuffle=True)
        self.loaders = [self._loader(part, shuffle=False) for part in parts]
        some = (part.take(torch.arange(min(CURVE_IMAGES, len(part.labels)))) for part in parts)
        self.curve_loaders = [self._loader(part, shuffle=False) for part in some]
        self.criterion = DoGoLoss(args.objective, weights=(args.weight, args.weight))
        set_seed(args.seed)  # the same initial weights in all processes ...
        self.networks = [self._network(name) for name in args.models]
        set_seed(args.seed, device_specific=True)  # ... but views of their own
        self.optimizers = [
            accelerator.prepare(Adam(network.parameters(), args.lr, weight_decay=1e-6)) for network in self.networks
        ]

    def _network(self, name: str) -> Any:
        try:
            network = TwoViewNetwork(build_model(name, self.source.num_classes), self.args.objective)
        except ValueError as error:
            raise SystemExit(f"--models {name}: {error}") from error
        return self.accelerator.prepare(network.to(memory_format=torch.channels_last))

    def _loader(self, data: Labelled, shuffle: bool) -> Any:
        """Batches of pixels and labels; whole ones only where we train."""
        images = TensorDataset(data.pixels, data.labels)
        return self.accelerator.prepare(DataLoader(images, self.args.batch_size, shuffle=shuffle, drop_last=shuffle))

    def train_epoch(self, epoch: int) -> Record:
        """Train both networks for one epoch; return the means of the parts of their losses."""
        parts = self.train_steps(epoch, len(self.train_loader))
        return {name: part.item() for name, part in parts.items()}

    def _step(self, *batch: Tensor) -> dict[str, Tensor]:
        pixels, _ = batch
        embeddings = [network(self._view(pixels), self._view(pixels)) for network in self.networks]
        if self.args.method == "dogo":
            losses = self.criterion(*embeddings)
            parts = {f"{name}_loss": part for name, part in self.criterion.last.items()}
        else:
            losses = [self.criterion(own) for own in embeddings]
            parts = {f"ssl_{name}_loss": loss.detach() for name, loss in zip(NAMES, losses, strict=True)}
        self.accelerator.backward(sum(losses))  # each loss reaches its own network only
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return parts

    def _view(self, pixels: Tensor) -> Tensor:
        view = augment(pixels / 255, self.args.image_size, self.args.smallest_crop, self.source.flip)
        return normalize(view, list(self.source.mean), list(self.source.std))

    def description(self) -> str:
        """The two networks, the objective and the size of the views."""
        sizes = (sum(parameter.numel() for parameter in network.parameters()) for network in self.networks)
        pair = (f"{name} ({size:,} parameters)" for name, size in zip(self.args.models, sizes, strict=True))
        return f"{' and '.join(pair)}, {self.args.objective} on views of {self.args.image_size}x{self.args.image_size}"

    def evaluate_curve(self) -> Record:
        """Nearest-neighbour accuracy on some of the images."""
        result: Record = {}
        for name, network in self.named():
            train, test = (self.encode(network, loader) for loader in self.curve_loaders)
            result[f"{name}_knn_accuracy"] = knn_accuracy(*train, *test)
        return result

    def evaluate_end(self) -> Record:
        """Nearest-neighbour and linear accuracy of both encoders on all images."""
        result: Record = {}
        for name, network in self.named():
            train, test = (self.encode(network, loader) for loader in self.loaders)
            result[f"{name}_knn_accuracy"] = knn_accuracy(*train, *test)
            result[f"{name}_linear_accuracy"] = linear_accuracy(*train, *test, self.source.num_classes)
        return result

    @torch.no_grad()
    def encode(self, network: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
        """Return features (N, dim) in float32 and labels (N,) of the plain images, on every process."""
        network.eval()
        batches = []
        for pixels, labels in loader:
            images = F.interpolate(pixels / 255, (self.args.image_size,) * 2, mode="bilinear", antialias=True)
            images = normalize(images, list(self.source.mean), list(self.source.std))
            with self.accelerator.autocast():
                features = self.accelerator.unwrap_model(network).features(images)
            batches.append(self.accelerator.gather_for_metrics((features.float(), labels)))
        features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return features, labels

    def named(self) -> list[tuple[str, nn.Module]]:
        return list(zip(NAMES, self.networks, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """Both networks in one state dict: `first.encoder...`, `second.encoder...`."""
        pair = {name: self.accelerator.unwrap_model(network) for name, network in self.named()}
        return nn.ModuleDict(pair).state_dict()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(SOURCES), default="digits", help="digits needs no download")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    add("--models", nargs=2, default=["resnet8", "resnet20"], help="as --model of train_cifar.py; may differ")
    add("--method", choices=["dogo", "alone"], default="dogo", help="with or without the peer")
    add("--objective", choices=["simclr", "simsiam"], default="simclr")
    add("--weight", type=float, default=100 / 256, help="of the mutual term; the authors' w is w / batch here")
    add("--epochs", type=positive, help="default 10 for digits, 200 for CIFAR")
    add("--batch-size", type=positive, help="global; default 128 for digits, 256 for CIFAR")
    add("--image-size", type=positive, help="of the views; default 16 for digits, 32 for CIFAR")
    add("--smallest-crop", type=float, help="share of the image; default 0.5 for digits, 0.2 for CIFAR")
    add("--lr", type=float, default=1e-3, help="of Adam; the authors' is 3e-4, over 1000 epochs")
    add("--seed", type=int, default=0)
    add("--limit", type=positive, metavar="N", help="first N training and test images only")
    add("--output-dir", type=Path, help="default runs/dogo-DATASET-METHOD-seedSEED, if taken with -2, -3 ...")
    add("--resume", action="store_true", help="continue the run in --output-dir, default the newest; or start one")
    add("--tracker", choices=["none", *LOGGER_TYPE_TO_CLASS], default="none")
    args = parser.parse_args(argv)
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir is for CIFAR: the digits come with scikit-learn")
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 < args.smallest_crop <= 1:
        parser.error(f"--smallest-crop must lie in (0, 1], got {args.smallest_crop}")
    if args.weight < 0:
        parser.error(f"--weight must be at least 0, got {args.weight}")
    args.default_output_dir = Path("runs", f"dogo-{args.dataset}-{args.method}-seed{args.seed}")
    return args


if __name__ == "__main__":
    main()
