"""Train a small net for a few steps on this rank's share of fixed batches; rank 0 saves what came out.

Started by test_processes.py, plainly or under torchrun: ``python ranks.py FILE``.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sfr


def net() -> nn.Module:
    """No batch statistics: they would differ between shares of a batch by design."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def main(file: str) -> None:
    distributed = dist.is_torchelastic_launched()
    if distributed:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    wrapped = sfr.SFRWrapper(net(), weight=0.5, warmup=3, momentum=0.05)
    criterion = sfr.SFRLoss(wrapped)
    model = DistributedDataParallel(wrapped) if distributed else wrapped
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    torch.manual_seed(1)
    losses = []
    for _ in range(6):
        images, labels = torch.randn(8, 3, 12, 12), torch.randint(0, 4, (8,))
        share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        loss = criterion(model(images[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        mean = loss.detach().clone()
        if distributed:
            dist.all_reduce(mean)
        losses.append(mean / ranks)
        gradients = [parameter.grad.clone() for parameter in wrapped.parameters()]
        optimizer.step()
    result = {
        "ranks": ranks,
        "losses": torch.stack(losses),
        "gradients": gradients,
        "weights": wrapped.state_dict(),
        "distributions": criterion.labels.distributions,
        "counts": criterion.labels.counts,
    }
    torch.save(result, f"{file}.{rank}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
