"""Train a small diffusion transformer to draw images, its deep blocks supervising the shallow ones as in LayerSync.

    python examples/train_flow.py                                       # digits, two minutes
    python examples/train_flow.py --method vanilla                      # the baseline
    python examples/train_flow.py --dataset cifar10 --data-dir DIR      # from local Parquet

Flow matching: the network learns the velocity that leads from an image to noise, of images of a given class. Each token
of the block at 0.3 of the depth is pulled towards the same token of the block at 0.7, by the cosine
(LayerSync, arXiv 2510.12581); --sfr takes any other arguments of SFRLoss, such as matching=transport. A slow average of
the weights is what draws, is judged and is written; with --average-supervises its deep block takes the place of the
network's own, as in SRA (arXiv 2505.02831) without its projection head. A tenth of the images come without their class,
so that --guidance can tell what a class adds.

Five times in a run samples.png in its folder shows what is drawn, a row for each class. The error of the velocity on
test images has noise and times of its own, the same for every run and every epoch.

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
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image

import sfr
from common import data, learning_rate, options, runs
from common.atomic_file import replace_file
from common.diffusion_transformer import DiffusionTransformer
from common.flow import guided, noisy, sample

LAYERSYNC: dict[str, Any] = {"matching": "in_place", "pairs": [(0.3, 0.7)], "feature_weight": 0.5}
CIFAR: dict[str, Any] = {
    "epochs": 100, "batch_size": 128, "lr": 1e-3, "image_size": 32, "patch": 4, "width": 192, "depth": 12
}  # fmt: skip
DEFAULTS = {
    "digits": {"epochs": 40, "batch_size": 64, "lr": 2e-3, "image_size": 8, "patch": 2, "width": 48, "depth": 6},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}
COLUMNS, SHOWN_CLASSES = 8, 10  # of samples.png
DRAWN = 5  # times in a run
QUARTERS = 4  # of the time, for the error of the velocity


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line `argv` says; return the slow average of the network."""
    args = parse_arguments(argv)
    accelerator = runs.build_accelerator(args)
    average = train(args, accelerator)
    accelerator.end_training()
    return average


def train(args: argparse.Namespace, accelerator: Accelerator) -> nn.Module:
    """Go through one whole run, from its data set to its folder; return the slow average of the network."""
    with runs.opened(args, accelerator, {"sfr": sfr_settings(args)}) as run:
        splits = run.load(lambda: data.load_splits(args.dataset, args.data_dir, args.limit))
        train_loader, test_loader = run.pixels(splits.train.data, shuffle=True), run.pixels(splits.test.data)

        set_seed(args.seed)  # the same initial weights in all processes ...
        network = build(args).to(accelerator.device)
        average = AveragedModel(network, multi_avg_fn=lambda *state: follow(*state, longest=args.average))
        model, criterion = regularized(network, average, args)
        set_seed(args.seed, device_specific=True)  # ... but noise of their own
        optimizer = AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.01)
        steps = args.epochs * len(train_loader)
        schedule = learning_rate.warmup_then_cosine(optimizer, steps)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        accelerator.register_for_checkpointing(average)

        for epoch in run.epochs(train_loader, steps, criterion, describe(network)):
            model.train()
            for pixels, labels in epoch:
                images = prepared(pixels, args, flip=True)
                inputs, velocity = noisy(
                    images, torch.randn_like(images), (time := torch.rand_like(images[:, 0, 0, 0]))
                )
                loss = criterion(model(inputs, time, some_without(labels, args)), velocity)
                epoch.note(loss=loss, **parts(criterion))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                average.update_parameters(accelerator.unwrap_model(model))
            means = {f"train_{name}": mean for name, mean in epoch.means().items()}
            run.keep({"epoch": epoch.number, **means, **epoch.speed(), **evaluate(average, test_loader, run)})
            due = epoch.number * DRAWN // args.epochs > (epoch.number - 1) * DRAWN // args.epochs
            if due and accelerator.is_main_process:
                draw(average, args, accelerator.device)

        end = evaluate(average, test_loader, run, quarters=True)
        run.finish(average.module.state_dict(), end)
    return average.module


def regularized(network: nn.Module, average: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Return the model and its criterion: the two lines, or the error of the velocity alone."""
    if args.method == "vanilla":
        return network, nn.MSELoss()
    model = sfr.SFRWrapper(network, stages=r"blocks\.\d+", layout="tokens")
    supervisor = average if args.average_supervises else None
    return model, sfr.SFRLoss(model, sfr_settings(args), label_loss=nn.MSELoss(), supervisor=supervisor)


def sfr_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return all fields of the method's configuration, None for another method; every token is a node."""
    if args.method == "vanilla":
        return None
    try:
        return sfr.SFRConfig(**LAYERSYNC | {"max_grid": args.image_size // args.patch} | dict(args.sfr)).to_dict()
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--sfr: {error}") from error


def build(args: argparse.Namespace) -> DiffusionTransformer:
    try:
        return DiffusionTransformer(
            args.image_size,
            patch=args.patch,
            width=args.width,
            depth=args.depth,
            heads=args.heads,
            num_classes=data.SOURCES[args.dataset].num_classes,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error


def describe(network: nn.Module) -> str:
    return f"diffusion transformer: {sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def parts(criterion: nn.Module) -> dict[str, Tensor]:
    """Return the parts of the last loss, for the log."""
    if not isinstance(criterion, sfr.SFRLoss):
        return {}
    return {"velocity_loss": criterion.last.label, "feature_loss": criterion.last.feature}


@torch.no_grad()
def follow(averages: Any, weights: Any, steps: Any, *, longest: float) -> None:
    """Move slow averages towards the weights; over the whole run so far, until that is longer than `longest`."""
    kept = min(longest, (1 + int(steps)) / (10 + int(steps)))
    torch._foreach_lerp_(averages, weights, 1 - kept)


def prepared(pixels: Tensor, args: argparse.Namespace, flip: bool = False) -> Tensor:
    """Return pixels (B, 3, 32, 32) uint8 at the size of the run and in [-1, 1]; some mirrored where that may be."""
    images = F.adaptive_avg_pool2d(pixels / 127.5 - 1, args.image_size)
    if not (flip and data.SOURCES[args.dataset].flip):
        return images
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def some_without(labels: Tensor, args: argparse.Namespace) -> Tensor:
    """Return the labels (B,), some replaced by the one that stands for no class."""
    hidden = torch.rand(labels.shape, device=labels.device) < args.unlabelled
    return labels.masked_fill(hidden, no_class(args))


def no_class(args: argparse.Namespace) -> int:
    return data.SOURCES[args.dataset].num_classes


@torch.no_grad()
def evaluate(average: nn.Module, loader: Any, run: runs.Run, quarters: bool = False) -> dict[str, float]:
    """Return the error of the velocity on the test images, also of each quarter of the time, from image to noise."""
    average.eval()
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Tensor]] = []
    size = (run.args.batch_size, 3, run.args.image_size, run.args.image_size)
    for pixels, labels in loader:
        # All processes draw for the whole batch, and each takes its own part, so that their number changes nothing.
        images, start = prepared(pixels, run.args), run.accelerator.process_index * len(pixels)
        own = slice(start, start + len(pixels))
        noise = torch.randn(size, generator=generator)[own].to(images)
        time = torch.rand(size[0], generator=generator)[own].to(images)
        inputs, velocity = noisy(images, noise, time)
        error = (average(inputs, time, labels).float() - velocity).square().mean(dim=(1, 2, 3))
        found.append(run.accelerator.gather_for_metrics((error, time)))
    error, time = (torch.cat(values) for values in zip(*found, strict=True))
    result = {"test_loss": error.mean().item()}
    if quarters:
        quarter = (time * QUARTERS).long()
        result |= {f"test_loss_quarter_{i + 1}": error[quarter == i].mean().item() for i in range(QUARTERS)}
    return result


def draw(average: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Write samples.png, a row for each of the first classes; the noise is the same each time."""
    classes = min(SHOWN_CLASSES, data.SOURCES[args.dataset].num_classes)
    labels = torch.arange(classes).repeat_interleave(COLUMNS)
    shape = (len(labels), 3, args.image_size, args.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    average.eval()
    velocity = guided(average, args.guidance, no_class(args))
    images = sample(velocity, noise.to(device), labels.to(device), args.sampling_steps).cpu()
    shown = F.interpolate(images, scale_factor=max(1, 32 // args.image_size))
    replace_file(
        args.output_dir / "samples.png",
        lambda file: save_image(shown, file, "png", nrow=COLUMNS, normalize=True, value_range=(-1, 1)),
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(data.SOURCES), default="digits", help="digits needs no download")
    add("--data-dir", type=Path, help="folder with CIFAR's Parquet files, in place of the Hub")
    add("--method", choices=["sfr", "vanilla"], default="sfr")
    add("--sfr", nargs="+", type=options.key_value, default=[], metavar="KEY=VALUE", help="arguments of SFRLoss")
    add("--image-size", type=options.positive, help="pixels a side; default 8 for digits, 32 for CIFAR")
    add("--patch", type=options.positive, help="pixels a side of a token; default 2 for digits, 4 for CIFAR")
    add("--width", type=options.positive, help="channels of a token; default 48 for digits, 192 for CIFAR")
    add("--depth", type=options.positive, help="blocks; default 6 for digits, 12 for CIFAR")
    add("--heads", type=options.positive, default=4)
    add("--epochs", type=options.positive, help="default 40 for digits, 100 for CIFAR")
    add("--batch-size", type=options.positive, help="global; default 64 for digits, 128 for CIFAR")
    add("--lr", type=float, help="peak, of AdamW; default 2e-3 for digits, 1e-3 for CIFAR")
    add("--average", type=options.fraction, default=0.999, help="share that the slow average keeps at a step")
    add("--average-supervises", action="store_true", help="the deep block is that of the slow average, as in SRA")
    add("--sampling-steps", type=options.positive, default=20, help="of Heun's method, for samples.png")
    add("--unlabelled", type=options.fraction, default=0.1, help="share of the images that are shown without class")
    add(
        "--guidance", type=float, default=1.5, help="of samples.png: how often what the class adds is counted; 1: as is"
    )
    add("--seed", type=int, default=0)
    add("--limit", type=options.positive, metavar="N", help="first N training and test images only")
    add("--output-dir", type=Path, help="default runs/flow-DATASET-METHOD-seedSEED, if taken with -2, -3 ...")
    add("--resume", action="store_true", help="continue the run in --output-dir, default the newest; or start one")
    add("--tracker", choices=["none", *LOGGER_TYPE_TO_CLASS], default="none")
    args = parser.parse_args(argv)
    if (args.sfr or args.average_supervises) and args.method != "sfr":
        parser.error("--sfr and --average-supervises need --method sfr")
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir is for CIFAR: the digits come with scikit-learn")
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.default_output_dir = Path("runs", f"flow-{args.dataset}-{args.method}-seed{args.seed}")
    return args


if __name__ == "__main__":
    main()
