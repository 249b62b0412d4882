"""The feature term of the default configuration on a device without Triton: all pairs as one batch, in few launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfr.config import Solver
from sfr.feature.channels import channel_segments, match_channels
from sfr.feature.emd import emd_l2
from sfr.transport import solve


def batched_values(
    nodes: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    solver: Solver,
) -> tuple[Tensor, Tensor]:
    """Return the cosine distance of each pair and image, (P, B), and which of them are of finite nodes.

    The values are those of :func:`sfr.emd_l2` for the pairs as :func:`sfr.feature.channels.match_channels` makes them
    of the means of the segments, with the deep side detached. Nodes of different widths share one tensor, filled up
    with zeros.

    Args:
        nodes: sets of nodes, each (B, N, C), on one device, of at most float32.
        pairs: numbers of the shallow and the deep set of each pair, which have the same N; pairs of one size are
            neighbours.
        solver: see :func:`sfr.transport.solve`.
    """
    found = []
    for _, group in groupby(pairs, key=lambda pair: nodes[pair[0]].shape[1]):
        own = tuple(group)
        used = list(dict.fromkeys(number for pair in own for number in pair))
        numbers = tuple((used.index(shallow), used.index(deep)) for shallow, deep in own)
        found.append(_Batch.apply(_Run(numbers, solver), *(nodes[number] for number in used)))
    if len(found) == 1:
        return found[0]
    values, finite = (torch.cat(each) for each in zip(*found, strict=True))
    return values, finite


class _Run(NamedTuple):
    pairs: tuple[tuple[int, int], ...]
    solver: Solver

    def shallow_sides(self, nodes: Sequence[Tensor]) -> Iterator[tuple[int, slice, int]]:
        """Yield the number of a shallow set, the pairs next to each other that have it, and their common width."""
        start = 0
        for (shallow, width), group in groupby(self.pairs, key=lambda pair: (pair[0], _width(nodes, pair))):
            stop = start + len(list(group))
            yield shallow, slice(start, stop), width
            start = stop


def _width(nodes: Sequence[Tensor], pair: tuple[int, int]) -> int:
    return min(nodes[number].shape[2] for number in pair)


class _Batch(torch.autograd.Function):
    """The distances of pairs of one size; the way back goes by hand, in one pass for all of them."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *nodes: Tensor) -> tuple[Tensor, Tensor]:
        images, count = nodes[0].shape[:2]
        widths = [_width(nodes, pair) for pair in run.pairs]
        make = torch.empty if min(widths) == max(widths) else torch.zeros
        shape = (2, len(widths), images, count, max(widths))
        sides = make(shape, dtype=torch.float32, device=nodes[0].device)
        for shallow, pairs, width in run.shallow_sides(nodes):
            _write(nodes[shallow], sides[0, pairs, ..., :width])
        for i, (_, deep) in enumerate(run.pairs):
            _write(nodes[deep], sides[1, i, ..., : widths[i]])

        # As in sfr.feature.directions; images that are not finite become zeros, whose distance is zero.
        peak = torch.linalg.vector_norm(sides, math.inf, dim=(3, 4), keepdim=True)
        finite = (peak < math.inf).all(dim=0)
        sides = torch.where(finite, sides, 0.0)
        peak = torch.where(peak >= torch.finfo(torch.float32).tiny, peak, math.inf)
        sides.div_(peak)
        lengths = torch.linalg.vector_norm(sides, dim=4, keepdim=True)
        shortest = torch.linalg.vector_norm(lengths, dim=3, keepdim=True).mul_(1e-3 * count**-0.5).clamp_min_(1e-7)
        scale = torch.maximum(lengths, shortest)
        sides.div_(scale)

        with torch.autocast(sides.device.type, enabled=False):
            shallow, deep = sides.flatten(1, 2)
            squares = (lengths / scale).square_().flatten(1, 2)
            # Half the squared distance of unit vectors is 1 - cos; of shorter ones it is less than that.
            cost = torch.baddbmm(squares[1].mT, shallow, deep.mT, beta=0.5, alpha=-1)
            cost = cost.add_(squares[0], alpha=0.5).clamp_min_(0.0)
            plan = solve(cost, solver=run.solver)
        values = (cost * plan).sum(dim=(1, 2)).view(len(widths), images)
        finite = finite.view_as(values)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(finite)
        ctx.save_for_backward(sides, plan, lengths[0] > shortest[0], scale[0], peak[0], *nodes)
        return values, finite

    @staticmethod
    def backward(ctx: Any, of_values: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 1)
        if of_values is None:
            return None, *gradients
        sides, plan, free, scale, peak, *nodes = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            needed = [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
            values = values_by_pairs(nodes, ctx.run.pairs, ctx.run.solver)
            of_nodes = torch.autograd.grad(
                values, [nodes[i] for i in needed], of_values, create_graph=True, allow_unused=True
            )
            for i, gradient in zip(needed, of_nodes, strict=True):
                gradients[i] = gradient
            return None, *gradients
        with torch.autocast(sides.device.type, enabled=False):
            shallow, deep = sides.flatten(1, 2)
            # Envelope theorem: of s_p it is sum_q X_pq (s_p - d_q), and row p of the plan X sums to 1 / N.
            of_sides = torch.baddbmm(shallow, plan, deep, beta=1 / shallow.shape[1], alpha=-1).view(sides.shape[1:])
        along = (of_sides * sides[0]).sum(dim=3, keepdim=True).mul_(free)
        of_sides = torch.addcmul(of_sides, sides[0], along, value=-1).div_(scale).div_(peak)
        of_sides.mul_(of_values[:, :, None, None])
        for number, pairs, width in ctx.run.shallow_sides(nodes):
            if ctx.needs_input_grad[1 + number]:
                of_set = of_sides[pairs, ..., :width]
                of_set = of_set.sum(dim=0) if len(of_set) > 1 else of_set[0]
                own = _brought_back(nodes[number], of_set)
                gradients[number] = own if gradients[number] is None else gradients[number] + own
        return None, *gradients


def values_by_pairs(nodes: Sequence[Tensor], pairs: Sequence[tuple[int, int]], solver: Solver) -> Tensor:
    """Return the values of :func:`batched_values` by operations that can be differentiated twice, (P, B)."""
    values = []
    for shallow, deep in pairs:
        pair = nodes[shallow].float(), nodes[deep].detach().float()
        finite = torch.stack([side.isfinite().all(dim=2).all(dim=1) for side in pair]).all(dim=0)[:, None, None]
        shallow_side, deep_side = (torch.where(finite, side, 0.0) for side in pair)
        own, other = match_channels(shallow_side, deep_side, "mean")
        values.append(emd_l2(own, other, cost="cosine", solver=solver, reduction="none"))
    return torch.stack(values)


def _write(nodes: Tensor, out: Tensor) -> None:
    """Write nodes (B, N, C), or the means of their segments, into a tensor (..., B, N, width)."""
    width = out.shape[-1]
    if nodes.shape[2] > width and nodes.shape[2] % width == 0 and out.ndim == 3:
        torch.mean(nodes.unflatten(2, (-1, width)), dim=2, dtype=out.dtype, out=out)
    else:
        out.copy_(_narrowed(nodes, width))


def _narrowed(nodes: Tensor, width: int) -> Tensor:
    """Return nodes (B, N, C) as the means of their segments of `width` channels, unless they have no more."""
    return nodes if nodes.shape[2] == width else channel_segments(nodes.float(), width).mean(dim=1)


def _brought_back(nodes: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of nodes (B, N, C), given that of the means of their segments."""
    if gradient.shape == nodes.shape:
        return gradient.to(nodes.dtype)
    with torch.enable_grad():
        own = nodes.detach().requires_grad_()
        [result] = torch.autograd.grad(_narrowed(own, gradient.shape[2]), own, gradient)
    return result
