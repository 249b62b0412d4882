"""What test_agreeing.py runs: three ranks whose forwards skip blocks at random, or some of which watch none.

It is a process of its own, because ranks cannot be forked from one that has gone back through a graph before.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sfr


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).relu()


class Dropping(nn.Module):
    """Eight blocks, of which a forward leaves out those it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 8), nn.ModuleList(Block() for _ in range(8)), nn.Linear(8, 4)
        self.dropped: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            x = x if place in self.dropped else block(x)
        return self.head(x)


DROPPED = [{7, 1}, {0, 3, 5}, {2, 6}]


def of_one_rank(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=patience)
    found = []
    if kind == "alone" and rank == 1:  # no other rank takes part
        found.append(step(sfr.SFRWrapper(Dropping()), None, DROPPED[rank]))
    if kind == "trained":
        for _ in range(2):  # two models of the same structure, one after the other
            model = sfr.SFRWrapper(Dropping())
            parallel = DistributedDataParallel(model, find_unused_parameters=True)
            found.append(step(model, parallel, DROPPED[rank]))
            step(model, parallel, set())
            found.append(step(model, parallel, set()))
    if kind == "reported on one":
        model = sfr.SFRWrapper(Dropping())
        if rank == 2:
            model.dropped = DROPPED[rank]
            model.report(torch.randn(4, 6), repeats=1)
        dist.barrier()
        found.append(step(model, None, DROPPED[rank]))
    Path(folder, f"found-{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def step(model: sfr.SFRWrapper, parallel: nn.Module | None, dropped: set[int]) -> list[object]:
    """Return the stages, and how many pairs a step had."""
    criterion = sfr.SFRLoss(model)
    model.dropped = dropped
    criterion((parallel or model)(torch.randn(4, 6)), torch.arange(4)).backward()
    return [list(model.sfr.stage_names), len(criterion.last.pairs)]


if __name__ == "__main__":
    arguments = (sys.argv[1], sys.argv[2])
    torch.multiprocessing.start_processes(of_one_rank, arguments, nprocs=3, start_method="fork")
