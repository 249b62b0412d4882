"""What of nodes is compared and by how much each counts: their directions, their size and their masses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def root_mean_square(nodes: Tensor) -> Tensor:
    """Return the root mean square of each set of nodes (B, N, C), shape (B, 1, 1), without overflow.

    If all nodes are zero, it is the smallest normal number, so that it can be divided by.
    """
    tiny = torch.finfo(nodes.dtype).tiny
    largest = nodes.abs().amax(dim=(1, 2), keepdim=True).clamp_min(tiny)
    mean_square = (nodes / largest).square().mean(dim=(1, 2), keepdim=True)
    return (mean_square.sqrt() * largest).clamp_min(tiny)


def directions(nodes: Tensor, *, centred: bool = False) -> Tensor:
    """Return nodes (B, N, C), less their means over the channels if `centred`, each scaled to length 1.

    The direction of a node that is almost zero is noise, and its gradient would have no bound: nodes shorter than a
    thousandth of the root mean square length count as zero vectors, the more the shorter they are.
    """
    result: Tensor = _Directions.apply(nodes, centred)
    return result


class _Directions(torch.autograd.Function):
    """:func:`directions`, with one pass back in the place of one for each of its operations."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, centred: bool) -> Tensor:
        result, scale, free = _directions(nodes, centred)
        ctx.save_for_backward(nodes, result, scale, free)
        ctx.centred = centred
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        nodes, result, scale, free = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            again = _directions(nodes, ctx.centred)[0]
            return torch.autograd.grad(again, nodes, gradient, create_graph=True)[0], None
        along = (gradient * result).sum(dim=2, keepdim=True).mul_(free)
        gradient = torch.addcmul(gradient, result, along, value=-1).mul_(scale)
        return gradient - gradient.mean(dim=2, keepdim=True) if ctx.centred else gradient, None


def _directions(nodes: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the directions, by what each node was scaled (B, N, 1), and 1 for nodes of length 1, 0 for shorter."""
    # Squares of very large and very small features become representable, and no angle changes.
    peak = nodes.detach().abs().amax(dim=(1, 2), keepdim=True)
    empty = peak < torch.finfo(nodes.dtype).tiny  # a set of zeros has no directions, and gets no gradient
    peak = peak.masked_fill(empty, 1.0)
    nodes = nodes / peak
    squares = nodes.square().sum(dim=2, keepdim=True)
    shortest = 1e-3 * squares.detach().mean(dim=1, keepdim=True).sqrt()
    if centred:
        nodes = nodes - nodes.mean(dim=2, keepdim=True)
        squares = nodes.square().sum(dim=2, keepdim=True)
    least = shortest.square().masked_fill(empty, 1.0)  # of the squares, for the root of zero has no derivative
    factor = squares.clamp_min(least).rsqrt()
    return nodes * factor, (factor.detach() / peak).masked_fill(empty, 0.0), (squares.detach() > least).to(nodes.dtype)


@torch.no_grad()
def cross_reference(shallow: Tensor, deep: Tensor, *, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """Return DeepEMD's marginals, (B, N) and (B, M): a node weighs as much as it agrees with the other set's mean.

    With `scaled` both sets are divided by their root mean squares first.
    """
    if scaled:
        shallow, deep = (side / root_mean_square(side) for side in (shallow, deep))
    a = (shallow * deep.mean(dim=1, keepdim=True)).sum(dim=2).relu() + 1e-3
    b = (deep * shallow.mean(dim=1, keepdim=True)).sum(dim=2).relu() + 1e-3
    return a / a.sum(dim=1, keepdim=True), b / b.sum(dim=1, keepdim=True)
