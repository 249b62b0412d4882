"""Two ranks on halves of the batches equal one rank on the whole: alignment, loss, gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sfr.pretrain import KDEPLoss, PooledFeatures, fit_alignment


def network(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def of_one_rank(rank: int, ranks: int) -> dict[str, Any]:
    """Fit an alignment on this rank's share of the images and take one step of pre-training with it."""
    distributed = ranks > 1
    teacher, student = PooledFeatures(network(0, 12)), PooledFeatures(network(1, 5))
    torch.manual_seed(2)
    batches = [torch.randn(8, 3, 8, 8) + shift for shift in range(5)]
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    alignment = fit_alignment(teacher, [batch[share] for batch in batches], dim=5)
    model = DistributedDataParallel(student, find_unused_parameters=True) if distributed else student
    criterion = KDEPLoss(alignment)
    with torch.no_grad():
        features = teacher(batches[0][share])
    loss = criterion(model(batches[0][share]), features)
    loss.backward()
    mean = loss.detach().clone()
    if distributed:
        dist.all_reduce(mean)
    return {
        "ranks": dist.get_world_size() if distributed else 1,
        "alignment": alignment.state_dict(),
        "loss": mean / ranks,
        "gradient": student.model[0].weight.grad,
    }


@pytest.fixture(scope="module")
def results():
    return run_ranks(of_one_rank, 1, ranks=1), run_ranks(of_one_rank, 2, ranks=2)


@pytest.mark.parametrize("what", ["alignment", "loss", "gradient"])
def test_two_ranks_equal_one(results, what):
    (one,), (first, second) = results
    assert (first["ranks"], second["ranks"]) == (2, 2)
    torch.testing.assert_close(first[what], one[what], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second[what], first[what], rtol=0, atol=0)
