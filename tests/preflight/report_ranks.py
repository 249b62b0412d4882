"""What test_report.py runs: two ranks train, and the first one alone asks its criterion for a report before.

It is a process of its own, because ranks cannot be forked from one that has gone back through a graph before.
"""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import sfr


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    stem, body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(stem, nn.ReLU(), body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def of_one_rank(rank: int, folder: str, switches: dict[str, object], reports: bool) -> None:
    torch.set_num_threads(1)
    store, patience = dist.FileStore(f"{folder}/store", 2), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    criterion = sfr.SFRLoss(sfr.SFRWrapper(small_net()), **switches)
    images = torch.randn(2, 2, 4, 3, 12, 12)
    if reports and rank == 0:
        criterion.report(images[0, 0], repeats=1)
        store.set("reported", "yes")
    if reports:
        store.wait(["reported"], patience)  # until then this rank answers nothing
    for batch in images[rank]:
        logits = criterion.model(batch)
        criterion(logits, logits.argmax(dim=1), index=torch.arange(4) + 4 * rank).backward()
    torch.save(criterion.state_dict(), f"{folder}/state-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = (sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "report")
    torch.multiprocessing.start_processes(of_one_rank, arguments, nprocs=2, start_method="fork")
