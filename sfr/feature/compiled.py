"""The cosine distance of small sets of nodes on the CPU by one compiled function, where numba is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfr.transport import exact
from sfr.transport.fallback import OptionalSolver

Floats = NDArray[np.float32]
Booleans = NDArray[np.bool_]
Pairs = Sequence[tuple[int, int]]

UP_TO = 2**22  # products between the nodes of one problem, beyond which nothing was measured
THREADED_FROM = 2**24  # products in the whole batch


def _load() -> Callable[[Sequence[Floats], Pairs], tuple[Floats, Booleans, Floats]]:
    from sfr.feature.cosine_kernel import load

    kernel = exact.loaded(load)

    def compared(sets: Sequence[Floats], pairs: Pairs) -> tuple[Floats, Booleans, Floats]:
        images, size, _ = sets[0].shape
        widths, starts = [each.shape[2] for each in sets], np.cumsum([0, *(each.size for each in sets)])
        nodes = np.empty(starts[-1], np.float32)
        for start, each in zip(starts, sets, strict=False):
            nodes[start : start + each.size].reshape(each.shape)[:] = each
        of_pairs = [min(widths[shallow], widths[deep]) for shallow, deep in pairs]
        values, finite = np.empty((len(pairs), images), np.float32), np.empty((len(pairs), images), np.bool_)
        gradients = np.empty((len(pairs), images, size, max(of_pairs)), np.float32)
        given = nodes, starts, np.array(widths, np.int64), np.array(pairs, np.int64)
        threads = torch.get_num_threads() if images * size**2 * sum(of_pairs) >= THREADED_FROM else 1
        exact.in_threads(lambda part: kernel(*given, part.start, part.stop, values, finite, gradients), images, threads)
        return values, finite, gradients

    return compared


compiled_distances = OptionalSolver(
    "numba", _load, "numba does not work here, so PyTorch's operations and scipy compare the features, slower"
)


def can_compile(*given: Tensor) -> bool:
    """Whether these are plain float32 tensors in the CPU's memory, and no compiled function has failed yet."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # of torch.func, whose tensors hide their values
        and not exact.compiled_assignment.given_up
        and all(type(each) is Tensor and each.is_cpu and each.dtype == torch.float32 for each in given)
    )


def fits(shallow: Tensor, deep: Tensor) -> bool:
    """Whether the compiled function takes nodes (B, N, C) and (B, M, C), and is the faster way."""
    return (
        can_compile(shallow, deep)
        and shallow.shape == deep.shape
        and not deep.requires_grad
        and 0 < shallow.shape[1] * shallow[:1].numel() <= UP_TO
    )


def cosine_distances(
    nodes: Sequence[Tensor], pairs: Pairs, otherwise: Callable[[Sequence[Tensor]], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return :func:`sfr.emd_l2` of the cosine for each pair and image, (P, B), and which of them are of finite nodes.

    The wider side of a pair counts as the mean of its segments, and the deep side has no gradient. The value of nodes
    that are not finite is zero. It is None if numba does not work here.

    Args:
        nodes: sets of nodes of one size, each (B, N, C), float32.
        pairs: numbers of the shallow and the deep set of each pair, of which one width divides the other.
        otherwise: computes the values by PyTorch's operations, for a gradient that is to be differentiated itself.
    """
    found = compiled_distances([each.detach().numpy() for each in nodes], pairs)
    if found is None:
        exact.compiled_assignment.given_up = True  # or it would warn of the same
        return None
    values, finite, gradients = map(torch.from_numpy, found)
    supervised = {shallow for shallow, _ in pairs}
    given = [each if i in supervised else each.detach().clone() for i, each in enumerate(nodes)]
    return _WithGradient.apply(pairs, otherwise, values, gradients, *given), finite


class _WithGradient(torch.autograd.Function):
    """Values whose gradients with respect to the shallow side of each pair are known."""

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, otherwise: Any, values: Tensor, gradients: Tensor, *nodes: Tensor) -> Tensor:
        ctx.save_for_backward(gradients, *nodes)
        ctx.pairs, ctx.otherwise = pairs, otherwise
        return values

    @staticmethod
    def backward(ctx: Any, of_values: Tensor) -> tuple[Tensor | None, ...]:
        gradients, *nodes = ctx.saved_tensors
        needed = [i for i in range(len(nodes)) if ctx.needs_input_grad[4 + i]]
        of_nodes: dict[int, Tensor | None] = {}
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            found = torch.autograd.grad(
                ctx.otherwise(nodes), [nodes[i] for i in needed], of_values, create_graph=True, allow_unused=True
            )
            of_nodes = dict(zip(needed, found, strict=True))
        else:
            gradients = gradients * of_values[:, :, None, None]
            for (shallow, deep), gradient in zip(ctx.pairs, gradients, strict=True):
                if shallow in needed:
                    own = _of_all_channels(gradient, nodes[shallow].shape[2], nodes[deep].shape[2])
                    before = of_nodes.get(shallow)
                    of_nodes[shallow] = own if before is None else before + own
        return None, None, None, None, *(of_nodes.get(i) for i in range(len(nodes)))


def _of_all_channels(gradient: Tensor, width: int, other: int) -> Tensor:
    """Return the gradient of nodes of `width` channels, given that of the mean of their segments of `other` ones."""
    if width <= other:
        return gradient[..., :width]
    segments = width // other
    return (gradient[..., :other] / segments).repeat(1, 1, segments)
