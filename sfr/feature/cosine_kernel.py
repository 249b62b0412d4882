"""The cosine distance of sets of nodes, compiled by numba: directions, plan, value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sfr.transport.assignment import INFINITE_BITS, NEVER, bits, match
from sfr.transport.numba_functions import OPTIONS, Floats, compiled, tried

TINY = np.float32(np.finfo(np.float32).tiny)
ONE, ZERO = np.float32(1), np.float32(0)
SHORTEST = np.float32(1e-6)  # of the mean square length: shorter nodes count less


@njit(**OPTIONS)
def cosine_distances(shallow: Floats, deep: Floats, values: Floats, gradients: Floats) -> None:
    """Write :func:`sfr.emd_l2` of the cosine for each problem into `values`, and its gradient into `gradients`.

    A problem with a feature that is not finite gets NaN. The GIL is released.

    Args:
        shallow: nodes, contiguous, shape (B, N, C).
        deep: nodes, contiguous, shape (B, N, C).
        values: result, shape (B,).
        gradients: result, of the values with respect to the shallow nodes, shape (B, N, C).
    """
    size, width = shallow.shape[1], shallow.shape[2]
    own, other = np.empty((size, width), np.float32), np.empty((size, width), np.float32)
    own_scale, other_scale = np.empty((2, size), np.float32), np.empty((2, size), np.float32)
    cost, prices = np.empty((size, size), np.float32), np.empty(size, np.float32)
    column, scaled = np.empty(size, np.int32), np.empty((size, size), np.float32)
    distance, final, open_prices = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    rows, previous, owned = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    share = np.float32(1 / size)
    for problem in range(len(shallow)):
        sound = directions(shallow[problem], own, own_scale) and directions(deep[problem], other, other_scale)
        if sound:
            half_squares(own, other, cost)
            sound = match(cost, prices, column, scaled, distance, final, open_prices, rows, previous, owned) != 0
        if not sound:
            values[problem] = np.float32(np.nan)
            for p in range(size):
                for c in range(width):
                    gradients[problem, p, c] = np.float32(np.nan)
            continue
        total = ZERO
        for p in range(size):
            total += cost[p, column[p]]
            pull(own[p], other[column[p]], share, own_scale[0, p], own_scale[1, p], gradients[problem, p])
        values[problem] = total * share


@compiled
def directions(nodes: Floats, result: Floats, scale: Floats) -> Any:
    """Scale nodes (N, C) to length 1 as :func:`sfr.feature.directions.directions` does; return whether they are finite.

    Args:
        nodes: shape (N, C).
        result: their directions, shape (N, C).
        scale: result, shape (2, N): by what each node was scaled, 0 in a set of zeros; and 1 for nodes of length 1, 0
            for the shorter ones, which are scaled by a constant.
    """
    size, width = nodes.shape
    largest = np.int32(0)
    for p in range(size):
        for c in range(width):
            largest = max(largest, bits(nodes[p, c]) & NEVER)
    if largest >= INFINITE_BITS:
        return False
    peak = np.int32(largest).view(np.float32)
    empty = peak < TINY
    if empty:
        peak = ONE
    mean = ZERO
    for p in range(size):
        square = ZERO
        for c in range(width):
            value = nodes[p, c] / peak
            result[p, c] = value
            square += value * value
        scale[1, p] = square
        mean += square
    least = ONE if empty else SHORTEST * mean / np.float32(size)
    for p in range(size):
        square = scale[1, p]
        factor = ONE / np.sqrt(max(square, least))
        for c in range(width):
            result[p, c] *= factor
        scale[0, p] = ZERO if empty else factor / peak
        scale[1, p] = ONE if square > least else ZERO
    return True


@compiled
def half_squares(own: Floats, other: Floats, cost: Floats) -> None:
    """Write half the squared distances between the rows of two matrices (N, C) into `cost` (N, N)."""
    size, width = own.shape
    for p in range(size):
        for q in range(size):
            total = ZERO
            for c in range(width):
                gap = own[p, c] - other[q, c]
                total += gap * gap
            cost[p, q] = total / np.float32(2)


@compiled
def pull(
    own: Floats, other: Floats, share: np.float32, scale: np.float32, unit_length: np.float32, gradient: Floats
) -> None:
    """Write the gradient of half the squared distance of two directions (C,) with respect to the node of the first."""
    along = ZERO
    for c in range(len(own)):
        along += (own[c] - other[c]) * own[c]
    along *= unit_length
    for c in range(len(own)):
        gradient[c] = (own[c] - other[c] - along * own[c]) * share * scale


def load(*, cached: bool) -> Callable[[Floats, Floats, Floats, Floats], None]:
    """Return :func:`cosine_distances`, compiled and tried; see :func:`sfr.transport.numba_functions.tried`."""
    return tried(cosine_distances, _tried_on_two_nodes, [0.5, [[0.0, -0.5], [0.0, 0.0]]], cached)


def _tried_on_two_nodes(kernel: Callable[[Floats, Floats, Floats, Floats], None]) -> list[Any]:
    """Return value and gradient of the nodes (1, 0) and (0, 1), of which the deep side has the second twice."""
    shallow, deep = np.array([[[1, 0], [0, 1]]], np.float32), np.array([[[0, 1], [0, 1]]], np.float32)
    values, gradients = np.empty(1, np.float32), np.empty((1, 2, 2), np.float32)
    kernel(shallow, deep, values, gradients)
    return [float(values[0]), gradients[0].tolist()]
