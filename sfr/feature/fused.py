"""The feature term of the default configuration on a GPU, in a few launches whatever the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfr.feature.kernels import cost_kernel, gradient_kernel, join_kernel, pool_kernel
from sfr.feature.launch_tables import Spread, Tables, tables_of
from sfr.feature.pooling import Grid, Join
from sfr.transport.fused import OPTIONS, fused_plan
from sfr.transport.proximal import ITERATIONS

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
    tables = tables_of(layout, sets, pairs, maps[0].device, BLOCK_C, BLOCK_P)
    run = _Run(tables, pairs, otherwise, {i: [] for i, _ in tables.spreads if i in joining})
    with torch.cuda.device_of(maps[0]):  # Triton launches on the current device, whatever it is given
        values, finite = _FusedValues.apply(run, *maps)
    if values.requires_grad:
        for i, waiting in run.waiting.items():
            if maps[i].requires_grad:
                maps[i].register_hook(Join(lambda gradient, cells: cells.added_to(gradient), waiting))
    return values, finite


class _Run(NamedTuple):
    """What the passes forth and back of one step have in common; `waiting` is of the maps whose hook adds."""

    tables: Tables
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
        pool_kernel[tables.cells, images, len(tables.blocks)](
            *given, tables.blocks, nodes, LAST=tables.last, ALIGNED=tables.aligned, BLOCK_C=BLOCK_C,
            BLOCK_P=tables.window, **OPTIONS,
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


class _Cells(NamedTuple):
    """The gradient of the nodes of one map.

    Args:
        of_nodes: that of all nodes.
        spread: where the map's own are in it, and where they belong.
        feature_map: the map.
    """

    of_nodes: Tensor
    spread: Spread
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
