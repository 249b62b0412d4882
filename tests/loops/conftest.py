"""Shared by the loops: what a step is checked for, a checked step, and a process group of one."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import sfr
from sfr.feature import compiled_term, term


@pytest.fixture
def regularized(monkeypatch) -> Callable[[sfr.SFRLoss], None]:
    """Return the check after a backward: the feature term counted and sent a gradient into every stage it supervises.

    A step that is not checked counts for none: the check is of the last call of the criterion.
    """
    reached: set[str] = set()
    matched_pairs, compiled_values, to_nodes = term.matched_pairs, term.compiled_values, compiled_term.to_nodes

    def watched(maps, **settings):
        reached.clear()
        for pair in matched_pairs(maps, **settings):
            shallow = pair.nodes[0]
            if shallow.requires_grad:
                note = lambda gradient, name=pair.name: reached.add(name) if gradient.any() else None  # noqa: E731
                shallow.register_hook(note)
            yield pair

    def watched_together(maps, sides, joining, solver):
        reached.clear()
        counted = set()

        def watched_nodes(feature_map, grid, *, joining):
            nodes = to_nodes(feature_map, grid, joining=joining)
            [name] = [name for name, each in maps.items() if each is feature_map]

            def note(gradient):
                if gradient.any():
                    reached.update(f"{shallow} <- {deep}" for shallow, deep in counted if shallow == name)

            if nodes.requires_grad:
                nodes.register_hook(note)
            return nodes

        with monkeypatch.context() as patch:
            patch.setattr(compiled_term, "to_nodes", watched_nodes)
            values, finite = compiled_values(maps, sides, joining, solver)
        names = [(shallow, deep) for (shallow, _), (deep, _) in sides]
        if values.requires_grad:
            values.register_hook(
                lambda gradient: counted.update(name for name, own in zip(names, gradient, strict=True) if own.any())
            )
        return values, finite

    monkeypatch.setattr(term, "matched_pairs", watched)
    monkeypatch.setattr(term, "compiled_values", watched_together)

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
