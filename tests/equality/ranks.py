"""Trains a small net on the same global batches with 1, 2 and 4 processes: what each rank does."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from group_norm import group_norm_net
from torch import nn

import sfr

STEPS, BATCH, CLASSES = 6, 16, 4
CANDIDATES = 8  # images drawn for each that is taken


def accelerated(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str):
    """Return model and optimizer as Accelerate prepares them, its backward, and its context of one small step."""
    from accelerate import Accelerator  # not into the process of the tests

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2 if kind == "accumulated" else 1,
        mixed_precision="bf16" if kind == "bf16" else "no",
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator.backward, lambda: accelerator.accumulate(model)


def sharded(model: nn.Module):
    """Return the model sharded by FSDP2, block by block, an optimizer of the shards, plain backward, no context."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.children(), model]:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), torch.Tensor.backward, nullcontext


def train(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    wrapped = sfr.SFRWrapper(group_norm_net(CLASSES))
    rising = sfr.Ramp(0, 0.5, steps=3)
    criterion = sfr.SFRLoss(wrapped, feature_weight=rising, smoothing="class_mean", momentum=0.05)
    if kind == "fsdp2":
        model, optimizer, backward, small_step = sharded(wrapped)
    else:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.2)
        model, optimizer, backward, small_step = accelerated(wrapped, optimizer, kind)
    losses, gradients = [], []
    for images, labels in batches(clear=kind == "bf16"):
        share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        with small_step():
            loss = criterion(model(images[share]), labels[share])
            backward(loss)
            gradients.append([whole(parameter.grad) for parameter in wrapped.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean / ranks)
    return {
        "ranks": ranks,
        "model": type(model).__name__,
        "losses": torch.stack(losses),
        "features": criterion.last.feature,
        "first gradients": gradients[0],
        "gradients": gradients[-1],
        "weights": {name: whole(value) for name, value in wrapped.state_dict().items()},
        "distributions": criterion.labels.distributions,
        "counts": criterion.labels.counts,
    }


def batches(clear: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the same batches in every process.

    Args:
        clear: of many images take those of which a network in float32, trained on them alike, is surest. Of others
            rounding to bfloat16 would tip the prediction, and with it the counts, on one machine or another.
    """
    torch.manual_seed(10)
    net = group_norm_net(CLASSES)
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.2), []
    for _ in range(STEPS):
        drawn = BATCH * (CANDIDATES if clear else 1)
        images, labels = torch.randn(drawn, 3, 12, 12), torch.randint(0, CLASSES, (drawn,))
        if clear:
            first, second = net(images).detach().topk(2, dim=1).values.unbind(dim=1)
            surest = (first - second).topk(BATCH).indices
            images, labels = images[surest], labels[surest]
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((images, labels))
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, put together from its shards."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
