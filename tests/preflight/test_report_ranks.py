"""A report on one of several ranks: the others are neither waited for nor changed."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn

import sfr


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    stem, body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(stem, nn.ReLU(), body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def of_one_rank(rank: int, switches: dict[str, Any], reported: str | None) -> dict[str, torch.Tensor]:
    """Train, after a report on the first rank if there is a file by which it tells the others."""
    criterion = sfr.SFRLoss(sfr.SFRWrapper(small_net()), **switches)
    images = torch.randn(2, 2, 4, 3, 12, 12)
    if reported:
        store = dist.FileStore(reported, 2)
        if rank == 0:
            criterion.report(images[0, 0], repeats=1)
            store.set("reported", "yes")
        store.wait(["reported"], timedelta(seconds=60))  # until then the other rank answers nothing
    for batch in images[rank]:
        logits = criterion.model(batch)
        criterion(logits, logits.argmax(dim=1), index=torch.arange(4) + 4 * rank).backward()
    return criterion.state_dict()


@pytest.mark.parametrize(
    "switches",
    [{"smoothing": "class_mean"}, {"smoothing": "past", "num_samples": 8}],
    ids=["class means", "past predictions"],
)
def test_a_report_on_one_rank_alone_waits_for_no_other_and_changes_no_state(tmp_path, switches):
    plain = run_ranks(of_one_rank, switches, None)
    reported = run_ranks(of_one_rank, switches, str(tmp_path / "store"))
    expected = plain[0]
    assert expected["labels.step"] == 2
    for state in (*reported, *plain):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
