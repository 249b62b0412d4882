"""Fit an alignment on this rank's share of the images and take one step of pre-training with it; every rank saves.

Started by test_kdep_ranks.py, plainly or under torchrun: ``python kdep_ranks.py FILE``.
"""

import sys

import torch
import torch.distributed as dist
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


def main(file: str) -> None:
    distributed = dist.is_torchelastic_launched()
    if distributed:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
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
    result = {
        "ranks": ranks,
        "alignment": alignment.state_dict(),
        "loss": mean / ranks,
        "gradient": student.model[0].weight.grad,
    }
    torch.save(result, f"{file}.{rank}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
