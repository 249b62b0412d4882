"""Losses and gradients of a pair of networks on one rank's share of a batch, and without the ranks on all of it.

Started by test_dogo.py: ``python dogo_ranks.py FOLDER RANK RANKS``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfr.pretrain import DoGoLoss


class Heads(nn.Module):
    """A network without batch statistics, which would differ between shares of a batch by design."""

    def __init__(self, width: int, predict: bool) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, width))
        self.predictor = nn.Linear(width, width) if predict else None

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        projections = self.projector(a), self.projector(b)
        return projections if self.predictor is None else projections + tuple(map(self.predictor, projections))


def step(objective: str, share: slice, distributed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = [Heads(width, objective == "simsiam").double() for width in (4, 7)]
    views = torch.randn(4, 8, 6, dtype=torch.float64)[:, share]
    first, second = (DistributedDataParallel(network) if distributed else network for network in plain)
    criterion = DoGoLoss(objective, weights=(0.5, 2.0), sync=distributed)
    losses = criterion(first(*views[:2]), second(*views[2:]))
    sum(losses).backward()
    gradients = [parameter.grad for network in plain for parameter in network.parameters()]
    return {"losses": torch.stack(losses).detach(), "gradients": gradients}


def main(folder: Path, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    results = {
        objective: (step(objective, slice(None), distributed=False), step(objective, share, distributed=True))
        for objective in ("simclr", "simsiam")
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
