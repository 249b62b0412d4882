"""Different numbers of batches inside ``join()`` of DDP: it trains, or all ranks raise before they exchange."""

from typing import Any

import pytest
import torch
from group_norm import group_norm_net
from processes import run_ranks
from torch.nn.parallel import DistributedDataParallel

import sfr


def of_one_rank(rank: int, options: dict[str, Any], after: bool) -> str:
    """Train inside join() or after it; the second rank has one batch more than the first."""
    return (train_after if after else train_inside)(rank, options)


def train_inside(rank: int, options: dict[str, Any]) -> str:
    model = sfr.SFRWrapper(group_norm_net(4))
    parallel, criterion = DistributedDataParallel(model), sfr.SFRLoss(model, **options)
    batches = torch.randn(2 + rank, 4, 3, 12, 12)
    try:
        with parallel.join():
            for images in batches:
                criterion(parallel(images), torch.arange(4), index=torch.arange(4)).backward()
        return f"trained {criterion.step}"
    except RuntimeError as error:
        return f"{criterion.step} {error}"


def train_after(rank: int, options: dict[str, Any]) -> str:
    """Train without the criterion inside join(), then with it outside, and then with it inside of another one."""
    model = sfr.SFRWrapper(group_norm_net(4))
    parallel, criterion = DistributedDataParallel(model), sfr.SFRLoss(model, **options)
    images = torch.randn(4, 3, 12, 12)
    with parallel.join(), model.disable():
        for _ in range(2 + rank):
            parallel(images).mean().backward()
    for _ in range(2):
        criterion(parallel(images), torch.arange(4), index=torch.arange(4)).backward()
    outcome = f"trained {criterion.step}"
    try:
        with parallel.join():
            criterion(parallel(images), torch.arange(4), index=torch.arange(4)).backward()
    except RuntimeError as error:
        outcome += f", then {error}"
    return outcome


@pytest.mark.parametrize(
    "options",
    [{"smoothing": "class_mean"}, {"smoothing": "past", "num_samples": 4}],
    ids=["class means", "past"],
)
def test_what_ranks_exchange_is_an_error_on_each_of_them_before_the_first_step(options):
    for outcome in run_ranks(of_one_rank, options, False):
        assert outcome.startswith("0 with model.join(), a rank that has run out of batches takes no part")


@pytest.mark.parametrize("options", [{"smoothing": "none"}, {"smoothing": "uniform"}], ids=["none", "uniform"])
def test_where_nothing_is_exchanged_all_ranks_train(options):
    assert run_ranks(of_one_rank, options, False) == ["trained 2", "trained 3"]


def test_after_the_end_of_join_the_ranks_train_and_inside_the_next_one_it_is_an_error_again():
    for outcome in run_ranks(of_one_rank, {"smoothing": "class_mean"}, True):
        assert outcome.startswith("trained 2, then with model.join(), a rank that has run out of batches")
