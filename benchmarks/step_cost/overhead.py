"""What a training step costs with SFR, against the plain step: time and peak memory, measured side by side.

    python -m benchmarks.step_cost.overhead                                    # on the CPU, random images
    python -m benchmarks.step_cost.overhead --data-dir DIR                     # on CIFAR-100 images from local Parquet
    python -m benchmarks.step_cost.overhead --device cuda --precision bf16     # on a GPU
    python -m benchmarks.step_cost.overhead --device cuda --precision bf16 --graph   # without the host
    python -m benchmarks.step_cost.overhead --models resnet50:224:64 vit_small_patch16_224:224:64

A model is a name of examples/train_cifar.py (images of at most 32 pixels), torchvision or timm, and, behind colons, the
size of its images and batches. Two copies take turns on the same batches, one plain with cross-entropy, one wrapped
with SFRLoss. A step is forward, loss, backward and optimizer. The table shows medians and their ratio, and what the
three first parts take more than they take of the plain step; the JSON holds every single time. On a GPU the kernels
that a step launches are counted as well, and listed with their times as far as they are SFR's; with --graph the times
of whole steps are those of replays of a CUDA graph of each, which leave the host nothing to do.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import sfr
from benchmarks.common.environment import environment
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import markdown_table
from examples.common.data import IMAGE_SIZE, load_splits
from examples.common.models import build_model
from sfr.preflight.cost import StepCost, compare_steps, wait_for

Batch = tuple[Tensor, Tensor]
PARTS = ("forward", "loss", "backward")
DEFAULT_MODELS = [
    "resnet20:16",
    "resnet20:32",
    "resnet18:32",
    "vit_tiny_patch16_224:96:32",
    "convnext_atto:96:32",
    "efficientnet_lite0:96:32",
    "resnet20:16:64",
    "resnet20:16:1",
]


class Model(NamedTuple):
    """A network, and the size of its images and batches."""

    name: str
    image_size: int
    batch_size: int

    @classmethod
    def of(cls, text: str, args: argparse.Namespace) -> Model:
        """Read NAME[:SIZE[:BATCH]]."""
        name, size, batch = (*text.split(":"), "", "")[:3]
        return cls(name, int(size or args.image_size), int(batch or args.batch_size))

    @property
    def title(self) -> str:
        return f"{self.name}, {self.image_size} px, batch {self.batch_size}"

    def build(self) -> nn.Module:
        """Return a classifier of 100 classes; torchvision's with their own stem for images larger than CIFAR's."""
        if self.image_size > IMAGE_SIZE and self.name in torchvision.models.list_models():
            return torchvision.models.get_model(self.name, weights=None, num_classes=100)
        if "vit" in self.name:
            network: nn.Module = timm.create_model(self.name, num_classes=100, img_size=self.image_size)
            return network
        return build_model(self.name, 100)


def main() -> None:
    """Measure every model asked for, print the table and write the JSON."""
    args = parse_arguments()
    device = torch.device(args.device)
    config = sfr.SFRConfig.from_dict(json.loads(args.config))
    results = {}
    for model in (Model.of(text, args) for text in args.models):
        results[model.title] = result = measure(model, config, args, device)
        print(f"{model.title}: {result['time_ratio']:.3f}x time, {result['memory_ratio']:.3f}x memory", flush=True)
        record = {
            "environment": environment(device),
            "settings": settings(args),
            "sfr": config.to_dict(),
            "models": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(results)}\n\nwrote {args.output}")


def measure(model: Model, config: sfr.SFRConfig, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the cost of the plain step and of the step with SFR, after `args.train_steps` of training."""
    torch.manual_seed(0)
    batches = load_batches(model, args, device)
    plain = model.build().to(device).to(memory_format=memory_format(args))
    criterion = nn.CrossEntropyLoss()
    train = make_step(plain, criterion, batches, args)
    for _ in range(args.train_steps):  # the features of an untrained network are an easy case
        train()
    wrapped = sfr.SFRWrapper(copy.deepcopy(plain), example_input=batches[0][0])
    own = sfr.SFRLoss(wrapped, config)
    called: list[Any] = [torch.compile(each) if args.compile else each for each in (plain, wrapped)]
    steps = {
        "plain": make_step(called[0], criterion, batches, args),
        "sfr": make_step(called[1], own, batches, args),
    }
    costs = compare_steps(steps, device, args.repeats, warmup=2)
    if args.graph:
        replayed = compare_steps({name: recorded(step, device) for name, step in steps.items()}, device, args.repeats)
        costs = {name: replace(costs[name], seconds=cost.seconds) for name, cost in replayed.items()}
    parts = {name: Parts(device) for name in steps}
    for _ in range(args.repeats):
        for name, (net, loss) in {"plain": (called[0], criterion), "sfr": (called[1], own)}.items():
            make_step(net, loss, batches, args, parts[name])()
    result = summary(costs) | {f"{name}_parts": parts[name].medians() for name in parts}
    if device.type == "cuda":
        result |= profiled(steps)
    return result


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return the replay of a CUDA graph of a step that has been taken before; on another device the step."""
    if device.type != "cuda":
        return step
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Parts:
    """Times of forward, loss and backward of a step, the device being waited for after each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[list[float]] = []

    def begin(self) -> None:
        wait_for(self.device)
        self.seconds.append([])
        self._last = time.perf_counter()

    def end_part(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds[-1].append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        return {
            name: statistics.median(times) for name, times in zip(PARTS, zip(*self.seconds, strict=True), strict=True)
        }


def profiled(steps: dict[str, Callable[[], None]]) -> dict[str, Any]:
    """Return what the plain step and that with SFR launch: how much, how long it runs, and what SFR runs more of."""
    counts, times = {}, {}
    for name, step in steps.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
        counts[name] = Counter(event.name for event in kernels)
        times[name] = Counter[str]()
        for event in kernels:
            times[name][event.name] += event.time_range.elapsed_us()
    more = {name: times["sfr"][name] - times["plain"][name] for name in counts["sfr"]}
    return {
        **{f"{name}_launches": sum(count.values()) for name, count in counts.items()},
        **{f"{name}_kernel_seconds": sum(time.values()) / 1e6 for name, time in times.items()},
        "kernels_of_sfr": {
            name[:80]: {"launches": counts["sfr"][name] - counts["plain"][name], "microseconds": round(more[name], 1)}
            for name in sorted(more, key=lambda name: -more[name])[:20]
        },
    }


def make_step(
    model: nn.Module, criterion: nn.Module, batches: list[Batch], args: argparse.Namespace, parts: Parts | None = None
) -> Callable[[], None]:
    """Return one training step on the next batch, whose parts are timed if they are asked for."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    endless = cycle(batches)
    bfloat16 = args.precision == "bf16"

    def step() -> None:
        images, labels = next(endless)
        if parts:
            parts.begin()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(images)
            if parts:
                parts.end_part()
            loss = criterion(output, labels)
            if parts:
                parts.end_part()
        loss.backward()
        if parts:
            parts.end_part()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load_batches(model: Model, args: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Return a few batches on the device: of CIFAR-100, scaled to the size, or random ones without --data-dir."""
    count, size = 4, model.batch_size
    if args.data_dir is None:
        shape = (count * size, 3, model.image_size, model.image_size)
        images, labels = torch.randn(shape), torch.randint(0, 100, (count * size,))
    else:
        train = load_splits("cifar100", args.data_dir, count * size, 0.0).train
        loaded = [train.collate([train[i] for i in range(k * size, (k + 1) * size)]) for k in range(count)]
        images, labels = (torch.cat(parts) for parts in zip(*loaded, strict=True))
        images = F.interpolate(images, size=model.image_size, mode="bilinear", antialias=True)
    images = images.to(device).contiguous(memory_format=memory_format(args))
    return list(zip(images.split(size), labels.to(device).split(size), strict=True))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def summary(costs: dict[str, StepCost]) -> dict[str, Any]:
    plain, with_sfr = costs["plain"], costs["sfr"]
    return {
        "plain_seconds": plain.seconds,
        "sfr_seconds": with_sfr.seconds,
        "time_ratio": with_sfr.median / plain.median,
        "plain_peak_bytes": plain.peak_bytes,
        "sfr_peak_bytes": with_sfr.peak_bytes,
        "memory_ratio": with_sfr.peak_bytes / plain.peak_bytes,
        "plain_median": plain.median,
        "sfr_median": with_sfr.median,
    }


def row(title: str, result: dict[str, Any]) -> list[str]:
    more = (result["sfr_parts"][part] - result["plain_parts"][part] for part in PARTS)
    launched = "-"
    if "plain_launches" in result:
        launched = f"{result['plain_launches']} + {result['sfr_launches'] - result['plain_launches']}"
    return [
        title,
        f"{result['plain_median'] * 1e3:.1f}",
        f"{result['sfr_median'] * 1e3:.1f}",
        f"{result['time_ratio']:.3f}x",
        " / ".join(f"{seconds * 1e3:+.1f}" for seconds in more),
        f"{result['memory_ratio']:.3f}x",
        launched,
    ]


def table(results: dict[str, dict[str, Any]]) -> str:
    heads = ["model", "plain, ms", "SFR, ms", "time", "forward / loss / backward, ms more", "peak memory", "launches"]
    return markdown_table(heads, (row(title, result) for title, result in results.items()))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("precision", "channels_last", "repeats", "train_steps", "compile", "graph")
    return {name: getattr(args, name) for name in names} | {"images": "cifar100" if args.data_dir else "random"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=DEFAULT_MODELS, metavar="NAME[:SIZE[:BATCH]]")
    add("--data-dir", type=Path, help="CIFAR-100 Parquet files; random images without it")
    add("--batch-size", type=int, default=128)
    add("--image-size", type=int, default=IMAGE_SIZE)
    add("--repeats", type=int, default=15, help="timed steps of each kind")
    add("--train-steps", type=int, default=30, help="plain training before the measurement")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--channels-last", action="store_true", help="the memory format that convolutions prefer")
    add("--compile", action="store_true", help="compile both networks")
    add("--graph", action="store_true", help="time replays of a CUDA graph of each step")
    add("--config", default="{}", metavar="JSON", help='SFRConfig fields, as in \'{"grouping": "mean"}\'')
    add("--output", type=Path, help="default benchmarks/results/overhead-DEVICE.json")
    args = parser.parse_args()
    args.output = args.output or RESULTS / f"overhead-{args.device}.json"
    return args


if __name__ == "__main__":
    main()
