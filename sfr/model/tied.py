"""Which of two equally long axes is the batch: the one along which an output depends on one image alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sfr.model.formats import View
from sfr.model.kinds import is_batch_first
from sfr.model.trace import Sighting, Trace
from sfr.warn import warn_user

TIED = (
    "stage {name!r} has shape {shape}, and which of its first two axes is the batch cannot be told, because they are "
    "equally long. It is read as (batch, tokens, channels). If the batch is the second axis, state "
    "layout='sequence_first', else layout='tokens', or begin with a batch of another size"
)


def settle(trace: Trace, views: dict[str, View]) -> dict[str, View]:
    """Return how stages are read, once it is looked into those whose first two axes are equally long.

    Which axis is the batch is told by a short walk back through the autograd graph. Stages of a forward without
    gradient are left out: a later one will tell.

    Args:
        trace: what a forward has shown.
        views: how its stages are read by their shapes, by name.
    """
    settled, unclear = dict(views), []
    for sighting in trace.sightings:
        if sighting.name not in views or not is_tied(trace, sighting):
            continue
        second = _batch_is_second(trace, sighting)
        if trace.logits_node is None:
            del settled[sighting.name]
        elif second is None:
            unclear.append(sighting)
        elif second:
            settled[sighting.name] = dataclasses.replace(views[sighting.name], layout="sequence_first")
    if unclear:
        warn_user(TIED.format(name=unclear[0].name, shape=unclear[0].shape))
    return settled


def is_tied(trace: Trace, sighting: Sighting) -> bool:
    """Whether an output is read as tokens only because nothing tells which of its first two axes is the batch."""
    if trace.layout != "auto" or sighting.view is None or sighting.view.layout != "tokens":
        return False
    return sighting.shape[0] == sighting.shape[1] > 1 and is_batch_first(sighting.module) is None


def _batch_is_second(trace: Trace, sighting: Sighting) -> bool | None:
    """Return whether a part along the first axis depends on all images; None if the graph does not tell."""
    feature = trace.outputs.get(sighting.name)
    if feature is None or not feature.requires_grad or _is_sharded(trace):
        return None
    for earlier in itertools.islice(_earlier_maps(trace, sighting), 3):
        for place in (-1, 0):  # of which one may be a token that no image has a part in
            share = _share_of_one_image(feature, place, earlier)
            if share is not None:
                return share < 0.5
    return None


def _earlier_maps(trace: Trace, sighting: Sighting) -> Iterator[Sighting]:
    """Yield earlier outputs whose first axis is the batch for certain, the latest first."""
    place = next(index for index, other in enumerate(trace.sightings) if other is sighting)
    for earlier in reversed(trace.sightings[:place]):
        known = earlier.view and earlier.view.layout != "sequence_first" and not is_tied(trace, earlier)
        if known and earlier.node is not None and earlier.shape[0] == sighting.shape[0]:
            yield earlier


def _share_of_one_image(feature: Tensor, place: int, earlier: Sighting) -> float | None:
    """Return how much of the gradient of ``feature[place]`` falls on that place of an earlier output; None if none."""
    part = feature[place]
    pattern = torch.linspace(0, part.numel(), part.numel(), device=part.device).sin().to(part.dtype)
    try:
        total, edge = (part.flatten() * pattern).sum(), GradientEdge(earlier.node, 0)
        (slope,) = torch.autograd.grad(total, edge, retain_graph=True, allow_unused=True)
    except RuntimeError:  # reentrant checkpointing
        return None
    if slope is None or len(slope) != earlier.shape[0]:
        return None
    of_each = slope.detach().float().flatten(1).abs().sum(dim=1)
    return float(of_each[place] / of_each.sum()) if of_each.sum() > 0 else None


def _is_sharded(trace: Trace) -> bool:
    """Whether FSDP has hooks in the graph, which take every walk through it for the backward."""
    return any(kind.__name__.startswith(("FSDP", "FullySharded")) for kind in trace.counts)
