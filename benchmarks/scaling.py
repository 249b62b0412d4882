"""What a step of SFR communicates and costs as ranks, classes, batch and nodes grow.

    python benchmarks/scaling.py            # about three minutes; prints the tables of docs/scaling.md

Messages are counted, not timed: every collective that the forward and the criterion start is seen on its way through
PyTorch's dispatcher; DDP's own message is the gradients of the parameters. Times are of one process, but for the last
table, whose processes share the cores of one machine and exchange through its memory: it shows what is added, not how
a cluster scales. The model has the stages of a ResNet-20 and next to no work of its own, so that SFR stands out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from markdown_table import markdown_table
from overhead import environment
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfr
from sfr.preflight.cost import StepCost, compare_steps

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
RANKS = (1, 2, 4)
SURE = 20.0  # lead of the right logit; with more, numbers underflow, which is slow on a CPU
BATCH = 128  # images of all ranks together
WAIT = timedelta(minutes=5)

Row = dict[str, Any]


def main() -> None:
    """Count and measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling-cpu.json")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, list[Row]] = {
        "label term by classes": [label_cost(classes, args.repeats) for classes in (10, 100, 1000, 4000, 10000)],
        "feature term by batch": [feature_cost(batch, 4, args.repeats) for batch in (32, 128, 512)],
        "feature term by nodes": [feature_cost(128, grid, args.repeats) for grid in (2, 4, 8)],
        "label term by pixels": [
            pixel_cost(classes, size, args.repeats) for classes in (21, 150) for size in (64, 128)
        ],
    }
    runs = [run_ranks(ranks, args.repeats) for ranks in RANKS]
    parts["messages of a step"] = [merged(rows) for rows in zip(*(run["messages"] for run in runs), strict=True)]
    parts["step by ranks"] = [run["time"] for run in runs]
    record = {"environment": environment(CPU), "repeats": args.repeats, **parts}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, rows in parts.items():
        print(f"\n**{name[0].upper()}{name[1:]}**\n\n{table(rows)}")
    print(f"\nwrote {args.output}")


class Stages(nn.Module):
    """The stage outputs of a ResNet-20 on 32 x 32 images, (16, 32, 32), (32, 16, 16), (64, 8, 8), by 1 x 1 kernels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1, 2), nn.Conv2d(32, 64, 1, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images).mean(dim=(2, 3)))


def wrapped(classes: int, **options: Any) -> sfr.SFRWrapper:
    torch.manual_seed(0)
    return sfr.SFRWrapper(Stages(classes), stages=r"stages\.\d", **options)


def all_correct(logits: Tensor, target: Tensor) -> Tensor:
    """Return logits that get every label right: only right ones enter the class means, so this is the worst case."""
    return logits + SURE * F.one_hot(target, logits.shape[1])


# Cost of the parts, in one process


def label_cost(classes: int, repeats: int) -> Row:
    """Cost of the label term on 128 logits, against cross-entropy."""
    target = torch.randint(classes, (128,))
    row = against_cross_entropy(torch.randn(128, classes), target, repeats)
    return {"classes": classes, **row, "statistics MiB": round(classes**2 * 4 / 2**20, 2)}


def pixel_cost(classes: int, size: int, repeats: int) -> Row:
    """Cost of the label term on the logits of four segmented images, against cross-entropy."""
    target = torch.randint(classes, (4, size, size))
    logits = torch.randn(4, classes, size, size)
    row = against_cross_entropy(logits, target, repeats, spread=lambda hot: hot.movedim(-1, 1))
    return {"classes": classes, "image": f"{size} x {size}", **row, "logits MiB": round(logits.nbytes / 2**20, 1)}


def against_cross_entropy(
    logits: Tensor, target: Tensor, repeats: int, spread: Callable[[Tensor], Tensor] = lambda hot: hot
) -> Row:
    """Return time and peak memory of loss and gradient."""
    logits = (logits + SURE * spread(F.one_hot(target, logits.shape[1]))).requires_grad_()
    criterion = sfr.DynamicLabelSmoothing()
    costs = compare_steps(
        {
            "plain": lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
            "sfr": lambda: torch.autograd.grad(criterion(logits, target), logits),
        },
        CPU,
        repeats,
    )
    return {
        "cross-entropy ms": milliseconds(costs["plain"]),
        "SFR ms": milliseconds(costs["sfr"]),
        "cross-entropy MiB": round(costs["plain"].peak_bytes / 2**20, 2),
        "SFR MiB": round(costs["sfr"].peak_bytes / 2**20, 2),
    }


def feature_cost(batch: int, grid: int, repeats: int) -> Row:
    """Cost of the feature term alone, as the difference of two steps that are otherwise the same."""
    images, target = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    model = wrapped(10, max_grid=grid, smoothing="none")
    criterion = sfr.SFRLoss(model)

    def plain() -> None:
        with model.disable():
            criterion(model(images), target).backward()

    costs = compare_steps({"plain": plain, "sfr": lambda: criterion(model(images), target).backward()}, CPU, repeats)
    added = milliseconds(costs["sfr"]) - milliseconds(costs["plain"])
    return {
        "batch": batch,
        "nodes of a map": grid**2,
        "feature term ms": round(added, 1),
        "ms an image": round(added / batch, 2),
        "MiB": round((costs["sfr"].peak_bytes - costs["plain"].peak_bytes) / 2**20, 1),
    }


# Messages and steps of several processes


class Messages(TorchDispatchMode):
    """Notes the bytes that this rank puts into each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def run_ranks(ranks: int, repeats: int) -> Row:
    """Start the processes and return what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(of_one_rank, (ranks, folder, repeats), nprocs=ranks, start_method="spawn")
        result: Row = json.loads(Path(folder, "result.json").read_text())
    return result


def of_one_rank(rank: int, ranks: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", WAIT, ranks, rank)
    cases: list[Row] = [{"smoothing": "none"}, {"smoothing": "uniform"}]
    cases += [{"smoothing": "class_mean", "classes": classes} for classes in (10, 100, 1000, 4000)]
    messages = [count_messages(ranks, **case) for case in cases]
    result = {"messages": messages, "time": step_time(ranks, repeats)}
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def count_messages(ranks: int, smoothing: str, classes: int = 1000) -> Row:
    """Count what one step exchanges."""
    model = wrapped(classes, smoothing=smoothing)
    parallel = DistributedDataParallel(model)
    criterion = sfr.SFRLoss(parallel)
    images, target = share_of_batch(classes)
    with Messages() as messages:
        loss = criterion(all_correct(parallel(images), target), target)
    loss.backward()
    return {
        "label term": smoothing,
        "classes": classes,
        "gradient bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "messages": len(messages.sizes),
        f"bytes of {ranks} rank(s)": sum(messages.sizes),
    }


def merged(rows: tuple[Row, ...]) -> Row:
    """Put what different numbers of ranks exchange side by side; what should not differ must not."""
    row: Row = {}
    for other in rows:
        differing = [name for name in row.keys() & other.keys() if row[name] != other[name]]
        if differing:
            raise RuntimeError(f"{differing} differ between numbers of ranks: {rows}")
        row |= other
    return row


def share_of_batch(classes: int) -> tuple[Tensor, Tensor]:
    """Return this rank's part of a batch that is the same for any number of ranks."""
    torch.manual_seed(1)
    images, target = torch.randn(BATCH, 3, 32, 32), torch.randint(classes, (BATCH,))
    part = slice(dist.get_rank(), None, dist.get_world_size())
    return images[part], target[part]


def step_time(ranks: int, repeats: int) -> Row:
    """Time of a step under DDP, plain and with SFR in turn."""
    model = wrapped(1000)
    parallel = DistributedDataParallel(model)
    criterion = sfr.SFRLoss(parallel)
    images, target = share_of_batch(1000)

    def plain() -> None:
        with model.disable():
            criterion(parallel(images), target).backward()

    costs = compare_steps({"plain": plain, "sfr": lambda: criterion(parallel(images), target).backward()}, CPU, repeats)
    return {
        "ranks": ranks,
        "images of a rank": len(images),
        "plain ms": milliseconds(costs["plain"]),
        "SFR ms": milliseconds(costs["sfr"]),
    }


def milliseconds(cost: StepCost) -> float:
    """Return the fastest repeat: what else runs on a shared machine only ever adds."""
    return round(min(cost.seconds) * 1e3, 2)


def table(rows: list[Row]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row.values()] for row in rows]
    return markdown_table(list(rows[0]), cells)


if __name__ == "__main__":
    main()
