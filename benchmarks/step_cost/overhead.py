"""What a training step costs with SFR, against the plain step: time and peak memory, measured side by side.

    python -m benchmarks.step_cost.overhead                                    # on the CPU, random images
    python -m benchmarks.step_cost.overhead --data-dir DIR                     # on CIFAR-100 images from local Parquet
    python -m benchmarks.step_cost.overhead --device cuda --precision bf16     # on a GPU
    python -m benchmarks.step_cost.overhead --models resnet50 --image-size 224 --batch-size 64

Three copies of a model take turns on the same batches: one plain with cross-entropy, one wrapped with SFRLoss, and one
more whose transport plans cost nothing (the independent coupling), which shows the solver's share. A step is forward,
loss, backward and optimizer. The table shows medians and their ratio; the JSON holds every single time.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn

import sfr
from benchmarks.common.environment import environment
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import markdown_table
from examples.common.data import IMAGE_SIZE, load_splits
from examples.common.models import build_model
from sfr.preflight.cost import StepCost, compare_steps

Batch = tuple[Tensor, Tensor]


def main() -> None:
    """Measure every model asked for, print the table and write the JSON."""
    args = parse_arguments()
    device = torch.device(args.device)
    batches = load_batches(args, device)
    config = sfr.SFRConfig.from_dict(json.loads(args.config))
    results = {}
    for name in args.models:
        costs = measure(name, config, batches, args, device)
        results[name] = summary(costs)
        print(
            f"{name}: {results[name]['time_ratio']:.3f}x time, {results[name]['memory_ratio']:.3f}x memory", flush=True
        )
    record = {
        "environment": environment(device),
        "settings": settings(args),
        "sfr": config.to_dict(),
        "models": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(results)}\n\nwrote {args.output}")


def measure(
    name: str, config: sfr.SFRConfig, batches: list[Batch], args: argparse.Namespace, device: torch.device
) -> dict[str, StepCost]:
    """Return the cost of the plain step and of the step with SFR, after `args.train_steps` of training."""
    torch.manual_seed(0)
    plain = build(name, args.image_size).to(device).to(memory_format=memory_format(args))
    criterion = nn.CrossEntropyLoss()
    train = make_step(plain, criterion, batches, args)
    for _ in range(args.train_steps):  # the features of an untrained network are an easy case
        train()
    wrapped, unsolved = (sfr.SFRWrapper(copy.deepcopy(plain)) for _ in range(2))
    without_plans = make_step(unsolved, sfr.SFRLoss(unsolved, config), batches, args)
    steps = {
        "plain": make_step(plain, criterion, batches, args),
        "sfr": make_step(wrapped, sfr.SFRLoss(wrapped, config), batches, args),
        "unsolved": patch("sfr.feature.emd.solve", independent_coupling)(without_plans),
    }
    return compare_steps(steps, device, args.repeats, warmup=2)


def build(name: str, image_size: int) -> nn.Module:
    """Return a classifier of 100 classes; of images larger than CIFAR's one with its own stem."""
    if image_size == IMAGE_SIZE:
        return build_model(name, 100)
    return torchvision.models.get_model(name, weights=None, num_classes=100)


def independent_coupling(cost: Tensor, a: Tensor | None, b: Tensor | None, *_: object) -> Tensor:
    """Stand in for solve(): the plan that takes no solver, at next to no cost."""
    rows = torch.full_like(cost[:, :, 0], 1 / cost.shape[1]) if a is None else a
    columns = torch.full_like(cost[:, 0, :], 1 / cost.shape[2]) if b is None else b
    return rows[:, :, None] * columns[:, None, :]


def make_step(
    model: nn.Module, criterion: nn.Module, batches: list[Batch], args: argparse.Namespace
) -> Callable[[], None]:
    """Return one training step on the next batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    endless = cycle(batches)
    bfloat16 = args.precision == "bf16"

    def step() -> None:
        images, labels = next(endless)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load_batches(args: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Return a few batches on the device: of CIFAR-100, or random ones without --data-dir."""
    count, size = 8, args.batch_size
    if args.data_dir is None:
        shape = (count * size, 3, args.image_size, args.image_size)
        images, labels = torch.randn(shape), torch.randint(0, 100, (count * size,))
    else:
        train = load_splits("cifar100", args.data_dir, count * size, 0.0).train
        loaded = [train.collate([train[i] for i in range(k * size, (k + 1) * size)]) for k in range(count)]
        images, labels = (torch.cat(parts) for parts in zip(*loaded, strict=True))
    images = images.to(device).contiguous(memory_format=memory_format(args))
    return list(zip(images.split(size), labels.to(device).split(size), strict=True))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def summary(costs: dict[str, StepCost]) -> dict[str, Any]:
    plain, with_sfr, unsolved = costs["plain"], costs["sfr"], costs["unsolved"]
    return {
        "plain_seconds": plain.seconds,
        "sfr_seconds": with_sfr.seconds,
        "unsolved_seconds": unsolved.seconds,
        "time_ratio": with_sfr.median / plain.median,
        "transport_ratio": (with_sfr.median - unsolved.median) / plain.median,
        "plain_peak_bytes": plain.peak_bytes,
        "sfr_peak_bytes": with_sfr.peak_bytes,
        "memory_ratio": with_sfr.peak_bytes / plain.peak_bytes,
        "plain_median": plain.median,
        "sfr_median": with_sfr.median,
    }


def row(name: str, result: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{result['plain_median'] * 1e3:.1f}",
        f"{result['sfr_median'] * 1e3:.1f}",
        f"{result['time_ratio']:.3f}x",
        f"{result['transport_ratio']:.1%}",
        f"{result['plain_peak_bytes'] / 2**20:.0f}",
        f"{result['sfr_peak_bytes'] / 2**20:.0f}",
        f"{result['memory_ratio']:.3f}x",
    ]


def table(results: dict[str, dict[str, Any]]) -> str:
    heads = ["model", "plain, ms", "SFR, ms", "time", "of which transport", "plain, MiB", "SFR, MiB", "peak memory"]
    return markdown_table(heads, (row(name, result) for name, result in results.items()))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "image_size", "precision", "channels_last", "repeats", "train_steps")
    return {name: getattr(args, name) for name in names} | {"images": "cifar100" if args.data_dir else "random"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["resnet20", "resnet18"], help="names as in examples/train_cifar.py")
    add("--data-dir", type=Path, help="CIFAR-100 Parquet files; random images without it")
    add("--batch-size", type=int, default=128)
    add(
        "--image-size", type=int, default=IMAGE_SIZE, help="random images; other sizes than CIFAR's: torchvision models"
    )
    add("--repeats", type=int, default=15, help="timed steps of each kind")
    add("--train-steps", type=int, default=30, help="plain training before the measurement")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--channels-last", action="store_true", help="the memory format that convolutions prefer")
    add("--config", default="{}", metavar="JSON", help='SFRConfig fields, as in \'{"grouping": "mean"}\'')
    add("--output", type=Path, help="default benchmarks/results/overhead-DEVICE.json")
    args = parser.parse_args()
    if args.data_dir and args.image_size != IMAGE_SIZE:
        parser.error(f"--image-size is for random images: CIFAR's are {IMAGE_SIZE} pixels wide")
    args.output = args.output or RESULTS / f"overhead-{args.device}.json"
    return args


if __name__ == "__main__":
    main()
