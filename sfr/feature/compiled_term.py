"""The feature term of the default configuration on the CPU: one call of the compiled function for all pairs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sfr.config import Solver
from sfr.feature.batched import values_by_pairs
from sfr.feature.compiled import UP_TO, can_compile, cosine_distances
from sfr.feature.nodes import Grid, to_nodes

Side = tuple[str, Grid]

# What one call saves is the same for any size, about a millisecond, and its memory grows with the widest stage: beyond
# so many numbers pairs are taken one by one.
AT_ONCE_UP_TO = 2**21


def fits(maps: Mapping[str, Tensor], sides: Sequence[tuple[Side, Side]]) -> bool:
    """Whether the compiled function takes the two sides of every pair, the maps pooled to their grids."""
    used = [maps[name] for pair in sides for name, _ in pair]
    return (
        can_compile(*used)
        and all(len(each) == len(used[0]) and each.numel() > 0 for each in used)
        and all(_fits(maps, *pair) for pair in sides)
        and _numbers(maps, sides) <= AT_ONCE_UP_TO
    )


def _fits(maps: Mapping[str, Tensor], shallow: Side, deep: Side) -> bool:
    size = math.prod(shallow[1])
    narrow, wide = sorted(maps[name].shape[1] for name, _ in (shallow, deep))
    return size == math.prod(deep[1]) and wide % narrow == 0 and size**2 * narrow <= UP_TO


def _numbers(maps: Mapping[str, Tensor], sides: Sequence[tuple[Side, Side]]) -> int:
    """Return at most how many numbers the one call keeps: nodes and gradients, all as wide as the widest."""
    sets = {side for pair in sides for side in pair}
    widest, size = max(maps[name].shape[1] for name, _ in sets), max(math.prod(grid) for _, grid in sets)
    narrower = max(min(maps[name].shape[1] for name, _ in pair) for pair in sides)
    return len(next(iter(maps.values()))) * size * (len(sets) * widest + len(sides) * narrower)


def compiled_values(
    maps: Mapping[str, Tensor],
    sides: Sequence[tuple[Side, Side]],
    joining: Collection[str],
    solver: Solver,
) -> tuple[Tensor, Tensor] | None:
    """Return the feature term of each pair and image, (P, B), and which of them are of finite features.

    Pairs of one size take one call. It is None if numba does not work here.

    Args:
        maps: see :func:`sfr.feature.term.feature_terms`.
        sides: name and grid of the shallow and the deep side of each pair, which fit.
        joining: see :func:`sfr.feature.pooling.pool`.
        solver: of the transport, for a gradient that is to be differentiated itself.
    """
    by_size: dict[int, list[int]] = {}
    for i, ((_, grid), _) in enumerate(sides):
        by_size.setdefault(math.prod(grid), []).append(i)
    found: list[tuple[Tensor, Tensor]] = []
    for group in by_size.values():
        sets = list(dict.fromkeys(side for i in group for side in sides[i]))
        pairs = [(sets.index(sides[i][0]), sets.index(sides[i][1])) for i in group]
        nodes = [to_nodes(maps[name], grid, joining=name in joining) for name, grid in sets]
        of_group = cosine_distances(nodes, pairs, partial(values_by_pairs, pairs=pairs, solver=solver))
        if of_group is None:
            return None
        found.append(of_group)
    if len(found) == 1:
        return found[0]
    places = torch.tensor([i for group in by_size.values() for i in group], device="cpu").argsort()
    values, finite = (torch.cat(each)[places] for each in zip(*found, strict=True))
    return values, finite
