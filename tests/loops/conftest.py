"""Shared by the loops: what a step is checked for, a checked step, and a process group of one."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import sfr


@pytest.fixture
def regularized(monkeypatch) -> Callable[[sfr.SFRLoss], None]:
    """Return the check after a backward: the feature term counted and sent a gradient into every stage it supervises.

    A step that is not checked counts for none: the check is of the last call of the criterion.
    """
    reached: set[str] = set()
    matched_pairs = sfr.feature.term.matched_pairs

    def watched(maps, **settings):
        reached.clear()
        for pair in matched_pairs(maps, **settings):
            shallow = pair.nodes[0]
            if shallow.requires_grad:
                note = lambda gradient, name=pair.name: reached.add(name) if gradient.any() else None  # noqa: E731
                shallow.register_hook(note)
            yield pair

    monkeypatch.setattr(sfr.feature.term, "matched_pairs", watched)

    def check(criterion: sfr.SFRLoss) -> None:
        last = criterion.last
        assert last.weight > 0
        assert last.feature > 0
        assert last.pairs
        assert reached == set(last.pairs)

    return check


@pytest.fixture
def step(regularized):
    """Return a plain step of SGD on a loss, checked."""

    def take(model, criterion, loss):
        loss.backward()
        regularized(criterion)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None

    return take


@pytest.fixture
def one_process(tmp_path):
    """Start a process group of this process alone, in which DDP can be used."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
