"""The feature term of the default configuration on a GPU, in a few launches whatever the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sfr.feature.kernels import cost_kernel, gradient_kernel, join_kernel, pool_kernel
from sfr.feature.pooling import Grid, Join
from sfr.transport.fused import OPTIONS, fused_plan
from sfr.transport.proximal import ITERATIONS, default_beta

MAPS = 8  # arguments for maps that the pooling kernel has
BLOCK_C, BLOCK_P = 64, 32  # channels and positions of a map that a program takes at a time
MOST_ALIGNED = 8  # numbers of 16 bits that a thread reads at once


def fused_values(
    maps: Sequence[Tensor],
    sets: tuple[tuple[int, Grid], ...],
    pairs: tuple[tuple[int, int], ...],
    joining: Collection[int],
    otherwise: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the feature term of each pair and image, (P, B), and which of them are of finite features.

    Args:
        maps: channels first, (B, C), (B, C, L) or (B, C, H, W), at most 8, on one device, of at most float32.
        sets: of each set of nodes the number of its map, and its grid of at most 64 cells.
        pairs: numbers of the shallow and the deep set of each pair; pairs of one size are neighbours.
        joining: numbers of the maps whose gradient can take that of their nodes along, as in
            :func:`sfr.feature.pooling.pool`.
        otherwise: gives the values by PyTorch's operations, for a gradient that is to be differentiated itself.
    """
    layout = tuple((tuple(each.shape), each.stride()) for each in maps)
    tables = _tables(layout, sets, pairs, maps[0].device)
    run = _Run(tables, pairs, otherwise, {i: [] for i in tables.supervised if i in joining})
    with torch.cuda.device_of(maps[0]):  # Triton launches on the current device, whatever it is given
        values, finite = _FusedValues.apply(run, *maps)
    if values.requires_grad:
        for i, waiting in run.waiting.items():
            if maps[i].requires_grad:
                maps[i].register_hook(Join(lambda gradient, cells: cells.added_to(gradient), waiting))
    return values, finite


class _Run(NamedTuple):
    """What the passes forth and back of one step have in common; `waiting` is of the maps whose hook adds."""

    tables: _Tables
    pairs: tuple[tuple[int, int], ...]
    otherwise: Callable[[Sequence[Tensor]], Tensor]
    waiting: dict[int, list[tuple[int, Any]]]


class _FusedValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *maps: Tensor) -> tuple[Tensor, Tensor]:
        tables, images, pairs = run.tables, len(maps[0]), len(run.pairs)
        empty = maps[0].new_empty
        nodes, cost, plan, values = (
            empty(shape, dtype=torch.float32) for shape in (tables.nodes, tables.costs, tables.costs, (pairs, images))
        )
        sides = empty((2, pairs, images, 3, tables.block), dtype=torch.float32)
        finite = empty((pairs, images), dtype=torch.uint8)
        given = (*maps, *[maps[0]] * (MAPS - len(maps)))
        pool_kernel[tables.pooling_blocks, images, len(tables.sets)](
            *given, tables.sets, nodes, LAST=tables.last, ALIGNED=tables.aligned, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P,
            **OPTIONS,
        )  # fmt: skip
        cost_kernel[images, pairs](
            nodes, tables.pairs, images, cost, sides[0], sides[1], finite, BLOCK_N=tables.block, BLOCK_C=BLOCK_C,
            **OPTIONS,
        )  # fmt: skip
        for group in tables.groups:
            shape = (group.size * images, group.n, group.m)
            own = slice(group.cost, group.cost + math.prod(shape))
            fused_plan(
                cost[own].view(shape), None, None, beta=group.beta, iterations=ITERATIONS, plan=plan[own].view(shape),
                values=values[group.first : group.first + group.size],
            )  # fmt: skip
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(nodes, cost, plan, sides, *maps)
        finite = finite.view(torch.bool)
        ctx.mark_non_differentiable(finite)
        return values, finite

    @staticmethod
    def backward(ctx: Any, of_values: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_values is None:
            return (None,) * len(ctx.needs_input_grad)
        nodes, cost, plan, sides, *maps = ctx.saved_tensors
        run, tables, images = ctx.run, ctx.run.tables, len(maps[0])
        needed = [i for i in range(len(maps)) if ctx.needs_input_grad[1 + i]]
        gradients: dict[int, Tensor | None] = {}
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            found = torch.autograd.grad(
                run.otherwise(maps), [maps[i] for i in needed], of_values, create_graph=True, allow_unused=True
            )
            gradients = dict(zip(needed, found, strict=True))
            return None, *(gradients.get(i) for i in range(len(maps)))
        of_nodes = torch.empty_like(nodes)
        gradient_kernel[tables.gradient_blocks, images, len(tables.sets)](
            nodes, tables.sets, tables.pairs, cost, plan, sides[0], sides[1], of_values, *of_values.stride(), of_nodes,
            images, BLOCK_N=tables.block, BLOCK_C=BLOCK_C, **OPTIONS,
        )  # fmt: skip
        for i, spread in tables.spreads:
            if i not in needed:
                continue
            cells = _Cells(of_nodes, spread, maps[i])
            if i in run.waiting:
                run.waiting[i].append((torch._C._current_graph_task_id(), cells))
            else:
                gradients[i] = cells.added_to(gradients.get(i))
        return None, *(gradients.get(i) for i in range(len(maps)))


class _Spread(NamedTuple):
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


class _Cells(NamedTuple):
    """The gradient of the nodes of one map.

    Args:
        of_nodes: that of all nodes.
        spread: where the map's own are in it, and where they belong.
        feature_map: the map.
    """

    of_nodes: Tensor
    spread: _Spread
    feature_map: Tensor

    def added_to(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the map, a new tensor: that of its nodes, plus the one given."""
        spread, given = self.spread, self.feature_map if gradient is None else gradient
        if _of_position(given) is None:
            given = given.contiguous()
        result = torch.empty_like(given)
        strides = [each for tensor in (given, result) for each in (*tensor.stride()[:2], _of_position(tensor))]
        join_kernel[spread.blocks](
            given, self.of_nodes[spread.start :], result, *spread.sizes, *strides, GIVEN=gradient is not None,
            WINDOWS=spread.windows, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, **OPTIONS,
        )  # fmt: skip
        return result


def _of_position(feature_map: Tensor) -> int | None:
    """Return the stride from one position of a map (B, C, *spatial) to the next, row by row; None if it has none."""
    strides = [stride for size, stride in zip(feature_map.shape[2:], feature_map.stride()[2:], strict=True) if size > 1]
    if not strides:
        return 0
    return strides[-1] if len(strides) == 1 or strides[0] == feature_map.shape[-1] * strides[-1] else None


def _of_axes(values: Sequence[int], missing: int) -> tuple[int, int, int, int]:
    """Return a value for each axis of (B, C, H, W), of maps that may lack the last one or two."""
    batch, channels, *spatial = values
    return batch, channels, *_two(spatial, missing)


def _two(values: Sequence[int], missing: int) -> tuple[int, int]:
    """Return one value for each of two spatial axes, of which a map may lack the first or both."""
    first, second = (missing, missing, *values)[-2:]
    return first, second


class _Group(NamedTuple):
    """Pairs of one size: the first one, how many, their nodes, where their costs start, and the solver's beta."""

    first: int
    size: int
    n: int
    m: int
    cost: int
    beta: float


@dataclass(frozen=True)
class _Tables:
    """What the kernels read, where they write, and how they are launched.

    Args:
        sets, pairs: numbers of each set of nodes and of each pair, int32, see sfr.feature.kernels.
        groups: the pairs of one size each.
        spreads: of each set that is a shallow side the number of its map, and how its gradient is spread.
        supervised: numbers of the maps of those sets.
        nodes, costs: numbers in all.
        block: nodes that a program takes, a power of two.
        last, aligned: see :func:`sfr.feature.kernels.pool_kernel`.
        pooling_blocks, gradient_blocks: programs for one image and set of nodes.
    """

    sets: Tensor
    pairs: Tensor
    groups: tuple[_Group, ...]
    spreads: tuple[tuple[int, _Spread], ...]
    supervised: frozenset[int]
    nodes: int
    costs: int
    block: int
    last: bool
    aligned: int
    pooling_blocks: int
    gradient_blocks: int


@lru_cache(maxsize=64)
def _tables(
    layout: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    sets: tuple[tuple[int, Grid], ...],
    pairs: tuple[tuple[int, int], ...],
    device: torch.device,
) -> _Tables:
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
    groups: list[_Group] = []
    cost = 0
    for number, (shallow, deep) in enumerate(pairs):
        n, m, width = places[shallow][1], places[deep][1], min(places[shallow][2], places[deep][2])
        later = _next_pair(pairs, shallow, number + 1)
        sides = (*_side(*places[shallow], width), *_side(*places[deep], width))
        pair_rows.append([*sides, width, n, m, cost, later, 0, 0, 0])
        if not groups or (groups[-1].n, groups[-1].m) != (n, m):
            groups.append(_Group(number, 0, n, m, cost, default_beta(n, m, uniform=True)))
        groups[-1] = groups[-1]._replace(size=groups[-1].size + 1)
        cost += images * n * m
    shallow_sets = list(dict.fromkeys(shallow for shallow, _ in pairs))
    spreads = tuple((sets[number][0], _spread(set_rows[number], images)) for number in shallow_sets)
    of_sets, of_pairs = (torch.tensor(rows, dtype=torch.int32, device=device) for rows in (set_rows, pair_rows))
    blocks = [-(-channels // BLOCK_C) for _, _, channels in places]
    channels_and_strides = [number for row in set_rows for number in (row[2], row[8], *row[10:12])]
    return _Tables(
        of_sets, of_pairs, tuple(groups), spreads, frozenset(of_map for of_map, _ in spreads), start, cost,
        block=max(16, triton.next_power_of_2(max(count for _, count, _ in places))),
        last=all(row[9] == 1 or row[2] == 1 for row in set_rows),
        aligned=math.gcd(MOST_ALIGNED, *channels_and_strides),
        pooling_blocks=max(place[1] * count for place, count in zip(places, blocks, strict=True)),
        gradient_blocks=max(blocks),
    )  # fmt: skip


def _strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the strides of a map (B, C, H, W), zero along axes that it lacks or has one position along."""
    return _of_axes([stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)], 0)


def _spread(row: Sequence[int], images: int) -> _Spread:
    """Return how the gradient of a set is spread, from its row of numbers."""
    channels, height, width, *grid = row[2:7]
    windows = 1 if height % grid[0] == width % grid[1] == 0 else 2
    blocks = (-(-height * width // BLOCK_P), -(-channels // BLOCK_C), images)
    return _Spread(row[1], (channels, height * width, height, width, *grid), windows, blocks)


def _next_pair(pairs: Sequence[tuple[int, int]], shallow: int, start: int) -> int:
    """Return the first pair from `start` on with this shallow side, or -1."""
    own = [i for i, pair in enumerate(pairs) if i >= start and pair[0] == shallow]
    return own[0] if own else -1


def _side(start: int, count: int, channels: int, width: int) -> tuple[int, int, int, int]:
    """Return where nodes start, their channels, the segments these are cut into, and how many make one of those."""
    segments = channels // width
    return start, channels, segments, 1 if segments * width == channels else 3
