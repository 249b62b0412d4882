"""Ranks whose first forwards skip different blocks end with the same stages, and none waits for another."""

from typing import Any

import torch
import torch.distributed as dist
from processes import run_ranks
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


def of_one_rank(rank: int, kind: str) -> list[list[Any]]:
    """Forwards that skip blocks at random, or that some ranks do not watch."""
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
    return found


def step(model: sfr.SFRWrapper, parallel: nn.Module | None, dropped: set[int]) -> list[Any]:
    """Return the stages, and how many pairs a step had."""
    criterion = sfr.SFRLoss(model)
    model.dropped = dropped
    criterion((parallel or model)(torch.randn(4, 6)), torch.arange(4)).backward()
    return [list(model.sfr.stage_names), len(criterion.last.pairs)]


def found(kind: str) -> list[Any]:
    return run_ranks(of_one_rank, kind, ranks=3)


def test_ranks_that_drop_other_layers_find_the_same_stages_and_train_them():
    first, *others = found("trained")
    for (stages, _), (same, pairs) in (first[:2], first[2:]):
        assert stages == same
        assert len(stages) == 4
        assert pairs == 6
    for other in others:
        assert [stages for stages, _ in other] == [stages for stages, _ in first]


def test_a_rank_that_alone_watches_a_forward_does_not_wait():
    assert [len(steps) for steps in found("alone")] == [0, 1, 0]


def test_the_stages_of_a_report_on_one_rank_are_those_of_all():
    (first,), (second,), (third,) = found("reported on one")
    assert first[0] == second[0] == third[0]
