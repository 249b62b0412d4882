"""What the kernels of the feature term read besides maps: tables of numbers, the same in every step of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sfr.feature.pooling import Grid
from sfr.transport.proximal import default_beta

MOST_ALIGNED = 8  # numbers of 16 bits that a thread reads at once


class Spread(NamedTuple):
    """How the gradient of a set of nodes is spread over its map.

    Args:
        start: where the set starts among all nodes, (B, N, C).
        sizes: C, H * W, H and W of the map, and both axes of the grid.
        windows: along each axis, that may hold a position of the map.
        blocks: programs of a launch.
    """

    start: int
    sizes: tuple[int, ...]
    windows: int
    blocks: tuple[int, int, int]


class Group(NamedTuple):
    """Pairs of one size: the first one, how many, their nodes, where their costs start, and the solver's beta."""

    first: int
    size: int
    n: int
    m: int
    cost: int
    beta: float


@dataclass(frozen=True)
class Tables:
    """What the kernels read, where they write, and how they are launched.

    Args:
        sets: numbers of each set of nodes, int32, see sfr.feature.kernels.
        blocks, pairs: the same of each block of channels of a set, and of each pair.
        groups: the pairs of one size each.
        spreads: of each set that is a shallow side the number of its map, and how its gradient is spread.
        nodes, costs: numbers in all.
        block: nodes that a program takes, a power of two.
        last, aligned: see :func:`sfr.feature.kernels.pool_kernel`.
        cells, window: nodes of the largest set, and positions of a map that a program of the pooling takes at a time.
        gradient_blocks: programs for one image and set of nodes.
    """

    sets: Tensor
    blocks: Tensor
    pairs: Tensor
    groups: tuple[Group, ...]
    spreads: tuple[tuple[int, Spread], ...]
    nodes: int
    costs: int
    block: int
    last: bool
    aligned: int
    cells: int
    window: int
    gradient_blocks: int


@lru_cache(maxsize=64)
def tables_of(
    layout: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    sets: tuple[tuple[int, Grid], ...],
    pairs: tuple[tuple[int, int], ...],
    device: torch.device,
    block_c: int,
    block_p: int,
) -> Tables:
    """Return the tables of a step.

    Args:
        layout: shape and strides of each map.
        sets, pairs: see :func:`sfr.feature.fused.fused_values`.
        device: of the maps.
        block_c, block_p: channels and positions of a map that a program takes at a time.
    """
    images, places, start = layout[0][0][0], [], 0
    for of_map, grid in sets:
        place = (start, math.prod(grid), layout[of_map][0][1])
        places.append(place)
        start += images * place[1] * place[2]
    strides = {of_map: _strides_of(*layout[of_map]) for of_map, _ in sets}
    set_rows = []
    for number, ((of_map, grid), place) in enumerate(zip(sets, places, strict=True)):
        sizes = (*_of_axes(layout[of_map][0], 1)[1:], *_two(grid, 1))
        set_rows.append([of_map, place[0], *sizes, place[1], *strides[of_map], _next_pair(pairs, number, 0), 0, 0, 0])
    pair_rows: list[list[int]] = []
    groups: list[Group] = []
    cost = 0
    for number, (shallow, deep) in enumerate(pairs):
        n, m, width = places[shallow][1], places[deep][1], min(places[shallow][2], places[deep][2])
        later = _next_pair(pairs, shallow, number + 1)
        sides = (*_side(*places[shallow], width), *_side(*places[deep], width))
        pair_rows.append([*sides, width, n, m, cost, later, 0, 0, 0])
        if not groups or (groups[-1].n, groups[-1].m) != (n, m):
            groups.append(Group(number, 0, n, m, cost, default_beta(n, m, uniform=True)))
        groups[-1] = groups[-1]._replace(size=groups[-1].size + 1)
        cost += images * n * m
    shallow_sets = list(dict.fromkeys(shallow for shallow, _ in pairs))
    spreads = tuple((sets[number][0], _spread(set_rows[number], images, block_c, block_p)) for number in shallow_sets)
    block_rows = [[*row[:13], first, 0, 0] for row in set_rows for first in range(0, row[2], block_c)]
    of_sets, of_blocks, of_pairs = (
        torch.tensor(rows, dtype=torch.int32, device=device) for rows in (set_rows, block_rows, pair_rows)
    )
    cells = max(row[7] for row in set_rows)
    window = max(-(-row[3] // row[5]) * -(-row[4] // row[6]) for row in set_rows)
    channels_and_strides = [number for row in set_rows for number in (row[2], row[8], *row[10:12])]
    return Tables(
        of_sets, of_blocks, of_pairs, tuple(groups), spreads, start, cost,
        block=max(16, triton.next_power_of_2(cells)),
        last=all(row[9] == 1 or row[2] == 1 for row in set_rows),
        aligned=math.gcd(MOST_ALIGNED, *channels_and_strides),
        cells=cells,
        window=min(64, max(16, triton.next_power_of_2(window))),
        gradient_blocks=max(-(-channels // block_c) for _, _, channels in places),
    )  # fmt: skip


def _strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the strides of a map (B, C, H, W), zero along axes that it lacks or has one position along."""
    return _of_axes([stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)], 0)


def _spread(row: Sequence[int], images: int, block_c: int, block_p: int) -> Spread:
    """Return how the gradient of a set is spread, from its row of numbers."""
    channels, height, width, *grid = row[2:7]
    windows = 1 if height % grid[0] == width % grid[1] == 0 else 2
    blocks = (-(-height * width // block_p), -(-channels // block_c), images)
    return Spread(row[1], (channels, height * width, height, width, *grid), windows, blocks)


def _next_pair(pairs: Sequence[tuple[int, int]], shallow: int, start: int) -> int:
    """Return the first pair from `start` on with this shallow side, or -1."""
    own = [i for i, pair in enumerate(pairs) if i >= start and pair[0] == shallow]
    return own[0] if own else -1


def _side(start: int, count: int, channels: int, width: int) -> tuple[int, int, int, int]:
    """Return where nodes start, their channels, the segments these are cut into, and how many make one of those."""
    segments = channels // width
    return start, channels, segments, 1 if segments * width == channels else 3


def _of_axes(values: Sequence[int], missing: int) -> tuple[int, int, int, int]:
    """Return a value for each axis of (B, C, H, W), of maps that may lack the last one or two."""
    batch, channels, *spatial = values
    return batch, channels, *_two(spatial, missing)


def _two(values: Sequence[int], missing: int) -> tuple[int, int]:
    """Return one value for each of two spatial axes, of which a map may lack the first or both."""
    first, second = (missing, missing, *values)[-2:]
    return first, second
