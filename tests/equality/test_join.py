"""Different numbers of batches inside ``join()`` of DDP: it trains, or all ranks raise before they exchange."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from group_norm import group_norm_net
from torch.nn.parallel import DistributedDataParallel

import sfr


def of_one_rank(rank: int, folder: str, options: dict[str, object]) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    model = sfr.SFRWrapper(group_norm_net(4), **options)
    parallel, criterion = DistributedDataParallel(model), sfr.SFRLoss(model)
    batches = torch.randn(2 + rank, 4, 3, 12, 12)
    try:
        with parallel.join():
            for images in batches:
                criterion(parallel(images), torch.arange(4), index=torch.arange(4)).backward()
        outcome = f"trained {criterion.step}"
    except RuntimeError as error:
        outcome = f"{criterion.step} {error}"
    Path(folder, f"outcome-{rank}").write_text(outcome)
    dist.destroy_process_group()


def outcomes(folder: Path, options: dict[str, object]) -> list[str]:
    torch.multiprocessing.start_processes(of_one_rank, (str(folder), options), nprocs=2, start_method="fork")
    return [(folder / f"outcome-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "options",
    [{"smoothing": "class_mean"}, {"smoothing": "past", "num_samples": 4}, {"smoothing": "none", "grouping": "svd"}],
    ids=["class means", "past", "svd"],
)
def test_what_ranks_exchange_is_an_error_on_each_of_them_before_the_first_step(tmp_path, options):
    for outcome in outcomes(tmp_path, options):
        assert outcome.startswith("0 with model.join(), a rank that has run out of batches takes no part")


@pytest.mark.parametrize("options", [{"smoothing": "none"}, {"smoothing": "uniform"}], ids=["none", "uniform"])
def test_where_nothing_is_exchanged_all_ranks_train(tmp_path, options):
    assert outcomes(tmp_path, options) == ["trained 2", "trained 3"]
