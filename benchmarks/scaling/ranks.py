"""Messages and steps of several processes under DDP."""

from __future__ import annotations

import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfr
from benchmarks.scaling.network import CPU, Row, all_correct, milliseconds, wrapped
from sfr.label_switches import Smoothing
from sfr.preflight.cost import compare_steps

BATCH = 128  # images of all ranks together
WAIT = timedelta(minutes=5)


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


def count_messages(ranks: int, smoothing: Smoothing, classes: int = 1000) -> Row:
    """Count what one step exchanges."""
    model = wrapped(classes)
    parallel = DistributedDataParallel(model)
    criterion = sfr.SFRLoss(parallel, smoothing=smoothing)
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
