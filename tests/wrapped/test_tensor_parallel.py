"""Tensor parallelism: blocks whose outputs are whole are matched as ever, layers that may return a part are not."""

from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sfr

RANKS = 2


class Block(nn.Module):
    """A residual block, of whose two layers each rank holds a part."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def of_blocks() -> tuple[nn.Module, dict[str, Any]]:
    net = nn.Sequential(nn.Linear(10, 16), Block(), Block(), nn.Linear(16, 4))
    return net, {f"{i}.{name}": plan() for i in (1, 2) for name, plan in PARTS.items()}


def of_layers() -> tuple[nn.Module, dict[str, Any]]:
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4))
    return net, {"2": ColwiseParallel(), "4": RowwiseParallel()}


PARTS = {"up": ColwiseParallel, "down": RowwiseParallel}


def train(rank: int, build: str, parallel: bool, wrapped_first: bool, stages: list[str] | None) -> dict[str, Any]:
    """Take twenty steps; return an error, or the loss and the weights of which each rank has a copy."""
    torch.manual_seed(0)
    net, plan = {"blocks": of_blocks, "layers": of_layers}[build]()
    images, labels = torch.randn(8, 10), torch.arange(8) % 4
    if wrapped_first:
        net = sfr.SFRWrapper(net, stages=stages)
    if parallel:
        net = parallelize_module(net, init_device_mesh("cpu", (RANKS,)), plan)
    model = net if wrapped_first else sfr.SFRWrapper(net, stages=stages)
    criterion = sfr.SFRLoss(model, gate="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        try:
            loss = criterion(model(images), labels)
        except (TypeError, ValueError) as error:
            return {"error": str(error)}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    copies = [each.detach() for each in model.parameters() if not hasattr(each, "placements")]
    return {"loss": loss.item(), "copies": torch.cat([each.flatten() for each in copies])}


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_blocks_train_as_in_one_process_and_the_ranks_stay_equal(wrapped_first: bool) -> None:
    [alone] = run_ranks(train, "blocks", False, False, None, ranks=1)
    first, second = run_ranks(train, "blocks", True, wrapped_first, None, ranks=RANKS)
    assert torch.equal(first["copies"], second["copies"])
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-4)


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_layers_that_may_return_a_part_have_to_be_named(wrapped_first: bool) -> None:
    for found in run_ranks(train, "layers", True, wrapped_first, None, ranks=RANKS):
        assert "the weights of '2' are spread over several ranks (tensor parallelism)" in found["error"]
    first, second = run_ranks(train, "layers", True, wrapped_first, ["1", "4"], ranks=RANKS)
    if wrapped_first:  # what the layer returns is no plain tensor yet when it is recorded
        assert "stage '4' returns a DTensor, which lies on several ranks; wrap the model after" in first["error"]
    else:
        assert torch.equal(first["copies"], second["copies"])
