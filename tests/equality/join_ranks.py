"""What test_join.py runs: two ranks inside ``join()`` of DDP, the second with one batch more than the first.

It is a process of its own, because ranks cannot be forked from one that has gone back through a graph before.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from group_norm import group_norm_net
from torch.nn.parallel import DistributedDataParallel

import sfr


def of_one_rank(rank: int, folder: str, options: dict[str, object]) -> None:
    """Train inside join() or, if the options say so, after it."""
    after = options.pop("after", "")
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    (train_after if after else train_inside)(rank, folder, options)
    dist.destroy_process_group()


def train_inside(rank: int, folder: str, options: dict[str, object]) -> None:
    model = sfr.SFRWrapper(group_norm_net(4))
    parallel, criterion = DistributedDataParallel(model), sfr.SFRLoss(model, **options)
    batches = torch.randn(2 + rank, 4, 3, 12, 12)
    try:
        with parallel.join():
            for images in batches:
                criterion(parallel(images), torch.arange(4), index=torch.arange(4)).backward()
        outcome = f"trained {criterion.step}"
    except RuntimeError as error:
        outcome = f"{criterion.step} {error}"
    Path(folder, f"outcome-{rank}").write_text(outcome)


def train_after(rank: int, folder: str, options: dict[str, object]) -> None:
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
    Path(folder, f"outcome-{rank}").write_text(outcome)


if __name__ == "__main__":
    arguments = (sys.argv[1], json.loads(sys.argv[2]))
    torch.multiprocessing.start_processes(of_one_rank, arguments, nprocs=2, start_method="fork")
