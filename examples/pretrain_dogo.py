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
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Adam
from torchvision.transforms.v2.functional import normalize

from common import data, frozen_features, models, options, runs, two_views
from sfr.pretrain import DoGoLoss, TwoViewNetwork

NAMES = ("first", "second")
CURVE_IMAGES = 2000  # for the curve only: at most so many training and test images
DEFAULTS: dict[str, dict[str, Any]] = {
    # 8x8 digits lose nothing in views of 16x16, but much of their strokes in small crops.
    "digits": {"epochs": 10, "batch_size": 128, "image_size": 16, "smallest_crop": 0.5},
    "cifar10": {"epochs": 200, "batch_size": 256, "image_size": 32, "smallest_crop": 0.2},
    "cifar100": {"epochs": 200, "batch_size": 256, "image_size": 32, "smallest_crop": 0.2},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train as the command line `argv` says."""
    args = parse_arguments(argv)
    accelerator = runs.build_accelerator(args)
    pretrain(args, accelerator)
    accelerator.end_training()


def pretrain(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Go through one whole run, from its data set to its folder."""
    with runs.opened(args, accelerator, {}) as run:
        splits = run.load(lambda: data.load_splits(args.dataset, args.data_dir, args.limit))
        parts = splits.train.data, splits.test.data
        train_loader = run.pixels(parts[0], shuffle=True)
        loaders = [run.pixels(part) for part in parts]
        some = (part.take(torch.arange(min(CURVE_IMAGES, len(part.labels)))) for part in parts)
        curve_loaders = [run.pixels(part) for part in some]

        criterion = DoGoLoss(args.objective, weights=(args.weight, args.weight), temperature=args.temperature)
        set_seed(args.seed)  # the same initial weights in all processes ...
        networks = [build(name, args, accelerator) for name in args.models]
        set_seed(args.seed, device_specific=True)  # ... but views of their own
        optimizers = [accelerator.prepare(Adam(net.parameters(), args.lr, weight_decay=1e-6)) for net in networks]
        pair = dict(zip(NAMES, networks, strict=True))

        for epoch in run.epochs(train_loader, args.epochs * len(train_loader), criterion, describe(pair, args)):
            for network in networks:
                network.train()
            for pixels, _ in epoch:  # labels are not looked at
                embeddings = [network(view(pixels, args), view(pixels, args)) for network in networks]
                if args.method == "dogo":
                    losses = criterion(*embeddings)
                    epoch.note(**{f"{name}_loss": part for name, part in criterion.last.items()})
                else:
                    losses = [criterion(own) for own in embeddings]
                    epoch.note(**{f"ssl_{name}_loss": loss for name, loss in zip(NAMES, losses, strict=True)})
                accelerator.backward(sum(losses))  # each loss reaches its own network only
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            for network in networks:
                runs.average_buffers(accelerator, network)
            record: dict[str, Any] = {"epoch": epoch.number, **epoch.means()}
            for name, network in pair.items():
                train, test = (encode(network, loader, args, accelerator) for loader in curve_loaders)
                record[f"{name}_knn_accuracy"] = frozen_features.knn_accuracy(*train, *test)
            run.keep(record)

        end: dict[str, Any] = {}
        for name, network in pair.items():
            train, test = (encode(network, loader, args, accelerator) for loader in loaders)
            end[f"{name}_knn_accuracy"] = frozen_features.knn_accuracy(*train, *test)
            end[f"{name}_linear_accuracy"] = frozen_features.linear_accuracy(
                *train, *test, data.SOURCES[args.dataset].num_classes
            )
        plain = {name: accelerator.unwrap_model(network) for name, network in pair.items()}
        run.finish(nn.ModuleDict(plain).state_dict(), end)  # `first.encoder...`, `second.encoder...`


def build(name: str, args: argparse.Namespace, accelerator: Accelerator) -> Any:
    """Return a network with the heads of the objective, prepared for the devices of this run."""
    try:
        network = TwoViewNetwork(models.build_model(name, data.SOURCES[args.dataset].num_classes), args.objective)
    except ValueError as error:
        raise SystemExit(f"--models {name}: {error}") from error
    return accelerator.prepare(network.to(memory_format=torch.channels_last))


def view(pixels: Tensor, args: argparse.Namespace) -> Tensor:
    """Return one random view of each image, normalised."""
    source = data.SOURCES[args.dataset]
    views = two_views.augment(pixels / 255, args.image_size, args.smallest_crop, source.flip)
    return normalize(views, list(source.mean), list(source.std))


def describe(pair: dict[str, nn.Module], args: argparse.Namespace) -> str:
    """The two networks, the objective and the size of the views."""
    sizes = (sum(parameter.numel() for parameter in network.parameters()) for network in pair.values())
    named = (f"{name} ({size:,} parameters)" for name, size in zip(args.models, sizes, strict=True))
    return f"{' and '.join(named)}, {args.objective} on views of {args.image_size}x{args.image_size}"


@torch.no_grad()
def encode(
    network: nn.Module, loader: Any, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Return features (N, dim) in float32 and labels (N,) of the plain images, on every process."""
    network.eval()
    batches = []
    for pixels, labels in loader:
        images = two_views.plain_view(pixels, args.image_size, data.SOURCES[args.dataset])
        with accelerator.autocast():
            features = accelerator.unwrap_model(network).features(images)
        batches.append(accelerator.gather_for_metrics((features.float(), labels)))
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return features, labels


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(data.SOURCES), default="digits", help="digits needs no download")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    add("--models", nargs=2, default=["resnet8", "resnet20"], help="as --model of train_cifar.py; may differ")
    add("--method", choices=["dogo", "alone"], default="dogo", help="with or without the peer")
    add("--objective", choices=["simclr", "simsiam"], default="simclr")
    add("--temperature", type=float, default=0.5, help="of simclr's similarities")
    add("--weight", type=float, default=100 / 256, help="of the mutual term; the authors' w is w / batch here")
    add("--epochs", type=options.positive, help="default 10 for digits, 200 for CIFAR")
    add("--batch-size", type=options.positive, help="global; default 128 for digits, 256 for CIFAR")
    add("--image-size", type=options.positive, help="of the views; default 16 for digits, 32 for CIFAR")
    add("--smallest-crop", type=float, help="share of the image; default 0.5 for digits, 0.2 for CIFAR")
    add("--lr", type=float, default=1e-3, help="of Adam; the authors' is 3e-4, over 1000 epochs")
    add("--seed", type=int, default=0)
    add("--limit", type=options.positive, metavar="N", help="first N training and test images only")
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
    if not args.temperature > 0:
        parser.error(f"--temperature must be above 0, got {args.temperature}")
    args.default_output_dir = Path("runs", f"dogo-{args.dataset}-{args.method}-seed{args.seed}")
    return args


if __name__ == "__main__":
    main()
