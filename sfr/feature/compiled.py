"""The cosine distance of small sets of nodes on the CPU by one compiled function, where numba is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfr.transport import exact
from sfr.transport.fallback import OptionalSolver

Floats = NDArray[np.float32]

UP_TO = 2**22  # products between the nodes of one problem, beyond which nothing was measured
THREADED_FROM = 2**24  # products in the whole batch


def _load() -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    from sfr.feature.cosine_kernel import load

    kernel = exact.loaded(load)

    def compared(shallow: Floats, deep: Floats) -> tuple[Floats, Floats]:
        values, gradients = np.empty(len(shallow), np.float32), np.empty_like(shallow)
        threads = torch.get_num_threads() if shallow.size * shallow.shape[1] >= THREADED_FROM else 1
        exact.in_threads(
            lambda part: kernel(shallow[part], deep[part], values[part], gradients[part]), len(shallow), threads
        )
        return values, gradients

    return compared


compiled_distances = OptionalSolver(
    "numba", _load, "numba does not work here, so PyTorch's operations and scipy compare the features, slower"
)


def fits(shallow: Tensor, deep: Tensor) -> bool:
    """Whether the compiled function takes nodes (B, N, C) and (B, M, C), and is the faster way."""
    return (
        not torch.compiler.is_compiling()
        and not exact.compiled_assignment.given_up
        and type(shallow) is type(deep) is Tensor
        and shallow.device.type == deep.device.type == "cpu"
        and shallow.dtype == deep.dtype == torch.float32
        and shallow.shape == deep.shape
        and not deep.requires_grad
        and 0 < shallow.shape[1] * shallow[:1].numel() <= UP_TO
    )


def cosine_distance(shallow: Tensor, deep: Tensor, otherwise: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Return :func:`sfr.emd_l2` of the cosine for nodes that fit, (B,); None if numba does not work here.

    Args:
        shallow, deep: nodes, (B, N, C), float32, the latter without gradient.
        otherwise: computes the same by PyTorch's operations, for a gradient that is to be differentiated itself.
    """
    found = compiled_distances(*(nodes.detach().contiguous().numpy() for nodes in (shallow, deep)))
    if found is None:
        exact.compiled_assignment.given_up = True  # or it would warn of the same
        return None
    value: Tensor = _WithGradient.apply(shallow, deep, *map(torch.from_numpy, found), otherwise)
    return value


class _WithGradient(torch.autograd.Function):
    """Values whose gradient with respect to the shallow nodes is known."""

    @staticmethod
    def forward(ctx: Any, shallow: Tensor, deep: Tensor, values: Tensor, gradients: Tensor, otherwise: Any) -> Tensor:
        ctx.save_for_backward(shallow, deep, gradients)
        ctx.otherwise = otherwise
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shallow, deep, gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            again = ctx.otherwise(shallow, deep)
            return *torch.autograd.grad(again, shallow, gradient, create_graph=True), None, None, None, None
        return gradients * gradient[:, None, None], None, None, None, None
