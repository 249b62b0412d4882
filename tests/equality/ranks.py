"""Trains a small net on the same global batches with 1, 2 and 4 processes; every rank saves what came out.

Started by conftest.py as ``python ranks.py FOLDER JOB...``. A job is RANKS-KIND, as in ``2-accumulated``. The processes
of a job are forked from one that has imported everything and loaded the compiled solver, and meet through a file: no
port is needed.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import Accelerator
from group_norm import group_norm_net
from torch import nn

import sfr

STEPS, BATCH, CLASSES = 6, 16, 4


def accelerated(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str):
    """Return model and optimizer as Accelerate prepares them, its backward, and its context of one small step."""
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


def train(kind: str, rank: int, ranks: int) -> dict[str, object]:
    wrapped = sfr.SFRWrapper(group_norm_net(CLASSES))
    rising = sfr.Ramp(0, 0.5, steps=3)
    criterion = sfr.SFRLoss(wrapped, feature_weight=rising, smoothing="class_mean", momentum=0.05)
    if kind == "fsdp2":
        model, optimizer, backward, small_step = sharded(wrapped)
    else:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.2)
        model, optimizer, backward, small_step = accelerated(wrapped, optimizer, kind)
    torch.manual_seed(10)  # batches where no prediction lies between two classes: bfloat16 would tip it either way
    losses, gradients = [], []
    for _ in range(STEPS):
        images, labels = torch.randn(BATCH, 3, 12, 12), torch.randint(0, CLASSES, (BATCH,))
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, put together from its shards."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def work(rank: int, ranks: int, kind: str, file: Path) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # read by Accelerate, used by nobody
        dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=ranks)
    torch.save(train(kind, rank, ranks), f"{file}.{rank}")
    if ranks > 1:
        dist.destroy_process_group()


def load_everything() -> None:
    """Once for all processes: what is loaded when first used takes longer than the training."""
    sfr.transport.solve(torch.rand(1, 2, 2))
    torch.optim.SGD(group_norm_net(CLASSES).parameters())


def main(folder: Path, jobs: list[str]) -> None:
    load_everything()
    for job in jobs:
        ranks, kind = job.split("-")
        arguments = (int(ranks), kind, folder / job)
        try:
            torch.multiprocessing.start_processes(work, arguments, nprocs=int(ranks), start_method="fork")
        except torch.multiprocessing.ProcessRaisedException as error:
            (folder / f"{job}.error").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
