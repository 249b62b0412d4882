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
    run = _Run(_tables(layout, sets, pairs, maps[0].device), sets, pairs, otherwise, {i: [] for i in joining})
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
    sets: tuple[tuple[int, Grid], ...]
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
        blocks = max(count * triton.cdiv(channels, BLOCK_C) for _, count, channels in tables.places)
        given = (*maps, *[maps[0]] * (MAPS - len(maps)))
        pool_kernel[blocks, images, len(tables.places)](
            *given, tables.sets, nodes, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, **OPTIONS
        )
        cost_kernel[images, pairs](
            nodes, tables.pairs, images, cost, sides[0], sides[1], finite, BLOCK_N=tables.block, BLOCK_C=BLOCK_C,
            **OPTIONS,
        )  # fmt: skip
        for group in tables.groups:
            shape = (group.size * images, group.n, group.m)
            own = slice(group.cost, group.cost + math.prod(shape))
            fused_plan(
                cost[own].view(shape), None, None, beta=default_beta(*shape[1:], uniform=True), iterations=ITERATIONS,
                plan=plan[own].view(shape), values=values[group.first : group.first + group.size],
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
        blocks = max(triton.cdiv(channels, BLOCK_C) for _, _, channels in tables.places)
        gradient_kernel[blocks, images, len(tables.places)](
            nodes, tables.sets, tables.pairs, cost, plan, sides[0], sides[1], of_values, *of_values.stride(), of_nodes,
            images, BLOCK_N=tables.block, BLOCK_C=BLOCK_C, **OPTIONS,
        )  # fmt: skip
        for number in dict.fromkeys(shallow for shallow, _ in run.pairs):
            i, grid = run.sets[number]
            if i not in needed:
                continue
            cells = _Cells(of_nodes, tables.places[number][0], grid, maps[i])
            if i in run.waiting:
                run.waiting[i].append((torch._C._current_graph_task_id(), cells))
            else:
                gradients[i] = cells.added_to(gradients.get(i))
        return None, *(gradients.get(i) for i in range(len(maps)))


class _Cells(NamedTuple):
    """The gradient of the nodes of one map.

    Args:
        of_nodes: that of all nodes.
        start: where the map's own start in it, (B, N, C).
        grid: the grid of the N nodes.
        feature_map: the map.
    """

    of_nodes: Tensor
    start: int
    grid: Grid
    feature_map: Tensor

    def added_to(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the map, a new tensor: that of its nodes, plus the one given."""
        like = self.feature_map
        result = torch.empty_like(like if gradient is None else gradient)
        given = result if gradient is None else gradient
        (height, width), grid = _two(like.shape[2:], 1), _two(self.grid, 1)
        blocks = triton.cdiv(height * width, BLOCK_P), triton.cdiv(like.shape[1], BLOCK_C), len(like)
        join_kernel[blocks](
            given, self.of_nodes[self.start :], result, like.shape[1], height, width, *grid,
            *given.stride()[:2], *_two(given.stride()[2:], 0), *result.stride()[:2], *_two(result.stride()[2:], 0),
            GIVEN=gradient is not None, BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, **OPTIONS,
        )  # fmt: skip
        return result


def _two(values: Sequence[int], missing: int) -> tuple[int, int]:
    """Return one value for each of two spatial axes, of which a map may lack the first or both."""
    first, second = (missing, missing, *values)[-2:]
    return first, second


class _Group(NamedTuple):
    """Pairs of one size: the first one, how many, their nodes, and where their costs start."""

    first: int
    size: int
    n: int
    m: int
    cost: int


@dataclass(frozen=True)
class _Tables:
    """What the kernels read, and where they write.

    Args:
        sets, pairs: numbers of each set of nodes and of each pair, int32, see sfr.feature.kernels.
        places: of each set of nodes where it starts, N and C.
        groups: the pairs of one size each.
        nodes, costs: numbers in all.
        block: nodes that a program takes, a power of two.
    """

    sets: Tensor
    pairs: Tensor
    places: tuple[tuple[int, int, int], ...]
    groups: tuple[_Group, ...]
    nodes: int
    costs: int
    block: int


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
    set_rows = []
    for number, ((of_map, grid), place) in enumerate(zip(sets, places, strict=True)):
        shape, strides = layout[of_map]
        sizes = (shape[1], *_two(shape[2:], 1), *_two(grid, 1), place[1])
        first = _next_pair(pairs, number, 0)
        set_rows.append([of_map, place[0], *sizes, *strides[:2], *_two(strides[2:], 0), first, 0, 0, 0])
    pair_rows: list[list[int]] = []
    groups: list[_Group] = []
    cost = 0
    for number, (shallow, deep) in enumerate(pairs):
        n, m, width = places[shallow][1], places[deep][1], min(places[shallow][2], places[deep][2])
        later = _next_pair(pairs, shallow, number + 1)
        sides = (*_side(*places[shallow], width), *_side(*places[deep], width))
        pair_rows.append([*sides, width, n, m, cost, later, 0, 0, 0])
        if not groups or (groups[-1].n, groups[-1].m) != (n, m):
            groups.append(_Group(number, 0, n, m, cost))
        groups[-1] = groups[-1]._replace(size=groups[-1].size + 1)
        cost += images * n * m
    of_sets, of_pairs = (torch.tensor(rows, dtype=torch.int32, device=device) for rows in (set_rows, pair_rows))
    block = max(16, triton.next_power_of_2(max(count for _, count, _ in places)))
    return _Tables(of_sets, of_pairs, tuple(places), tuple(groups), start, cost, block)


def _next_pair(pairs: Sequence[tuple[int, int]], shallow: int, start: int) -> int:
    """Return the first pair from `start` on with this shallow side, or -1."""
    own = [i for i, pair in enumerate(pairs) if i >= start and pair[0] == shallow]
    return own[0] if own else -1


def _side(start: int, count: int, channels: int, width: int) -> tuple[int, int, int, int]:
    """Return where nodes start, their channels, the segments these are cut into, and how many make one of those."""
    segments = channels // width
    return start, channels, segments, 1 if segments * width == channels else 3
