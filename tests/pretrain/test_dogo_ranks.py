"""Losses and gradients of a pair of networks on one rank's share of a batch, and without the ranks on all of it."""

from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfr.pretrain import DoGoLoss

OBJECTIVES = ["simclr", "simsiam"]


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


def of_one_rank(rank: int, ranks: int) -> dict[str, Any]:
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    return {
        objective: (step(objective, slice(None), distributed=False), step(objective, share, distributed=True))
        for objective in OBJECTIVES
    }


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """What each of two ranks got for each objective, first without its peer and then with it."""
    return run_ranks(of_one_rank, 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("what", ["losses", "gradients"])
def test_each_of_two_ranks_has_what_one_process_has_with_the_global_batch(ranks, objective, what):
    for alone, together in (rank[objective] for rank in ranks):
        torch.testing.assert_close(together[what], alone[what], rtol=1e-9, atol=1e-12)
