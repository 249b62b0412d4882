"""The cosine distance of sets of nodes, compiled by numba: directions, plan, value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sfr.transport.assignment import INFINITE_BITS, NEVER, Ints, bits, match
from sfr.transport.numba_functions import OPTIONS, Floats, compiled, tried

Booleans = NDArray[np.bool_]
Longs = NDArray[np.int64]

TINY = np.float32(np.finfo(np.float32).tiny)
ONE, ZERO = np.float32(1), np.float32(0)
SHORTEST = np.float32(1e-6)  # of the mean square length: shorter nodes count less


@njit(**OPTIONS)
def cosine_distances(
    nodes: Floats,
    starts: Longs,
    widths: Longs,
    pairs: Longs,
    first: int,
    end: int,
    values: Floats,
    finite: Booleans,
    gradients: Floats,
) -> None:
    """Write :func:`sfr.emd_l2` of the cosine for each pair and image into `values`, and its gradient into `gradients`.

    The wider side of a pair counts as the mean of its segments of as many channels as the other has. A problem with a
    feature that is not finite gets zeros. The GIL is released.

    Args:
        nodes: S sets of nodes one behind the other, each (B, N, C) with a C of its own, 1-d.
        starts: where each set starts, shape (S,).
        widths: channels that each set has, shape (S,).
        pairs: numbers of the shallow and the deep set of each pair, of which one width divides the other, shape (P, 2).
        first, end: the images to be done.
        values: result, shape (P, B).
        finite: result, whether all features of both sides are finite, shape (P, B).
        gradients: result, of the values with respect to the shallow side, shape (P, B, N, D), where D is the number of
            channels of the widest pair.
    """
    size, width = gradients.shape[2], gradients.shape[3]
    own, other = np.empty((size, width), np.float32), np.empty((size, width), np.float32)
    own_scale, other_scale = np.empty((2, size), np.float32), np.empty((2, size), np.float32)
    cost, prices = np.empty((size, size), np.float32), np.empty(size, np.float32)
    column, scaled = np.empty(size, np.int32), np.empty((size, size), np.float32)
    distance, final, open_prices = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    rows, previous, owned = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    share = np.float32(1 / size)
    for image in range(first, end):
        for pair in range(len(pairs)):
            shallow, deep = pairs[pair, 0], pairs[pair, 1]
            width = min(widths[shallow], widths[deep])
            own_nodes = of_image(nodes, starts[shallow], image, size, widths[shallow])
            sound = directions(own_nodes, widths[shallow] // width, width, own, own_scale)
            other_nodes = of_image(nodes, starts[deep], image, size, widths[deep])
            sound = sound and directions(other_nodes, widths[deep] // width, width, other, other_scale)
            if sound:
                half_squares(own, other, width, cost)
                sound = match(cost, prices, column, scaled, distance, final, open_prices, rows, previous, owned) != 0
            finite[pair, image] = sound
            total = ZERO
            if sound:
                for p in range(size):
                    total += cost[p, column[p]]
                pull(own, other, column, width, own_scale, gradients[pair, image])
            else:
                for p in range(size):
                    for c in range(width):
                        gradients[pair, image, p, c] = ZERO
            values[pair, image] = total * share


@compiled
def of_image(nodes: Floats, start: int, image: int, size: int, width: int) -> Any:
    """Return the nodes (N, C) of one image of the set that starts there."""
    first = start + image * size * width
    return nodes[first : first + size * width].reshape((size, width))


@compiled
def directions(nodes: Floats, segments: int, width: int, result: Floats, scale: Floats) -> Any:
    """Scale nodes to length 1 as :func:`sfr.feature.directions.directions` does; return whether they are finite.

    Args:
        nodes: shape (N, C).
        segments: how many segments of the channels make the mean that counts as a node.
        width: channels of a segment.
        result: the directions, in its first `width` columns, shape (N, D).
        scale: result, shape (2, N): by what each node was scaled, 0 in a set of zeros; and 1 for nodes of length 1, 0
            for the shorter ones, which are scaled by a constant.
    """
    largest = segment_means(nodes, segments, width, result)
    if largest >= INFINITE_BITS:
        return False
    scale_to_one(largest, width, result, scale)
    return True


@compiled
def segment_means(nodes: Floats, segments: int, width: int, result: Floats) -> Any:
    """Write the mean of the segments of each node into `result`; return the bits of the largest absolute value."""
    largest, share = np.int32(0), np.float32(1 / segments)
    for p in range(len(result)):
        for c in range(width):
            result[p, c] = nodes[p, c]
        for segment in range(1, segments):
            start = segment * width
            for c in range(width):
                result[p, c] += nodes[p, start + c]
        for c in range(width):
            result[p, c] *= share
            largest = max(largest, bits(result[p, c]) & NEVER)
    return largest


@compiled
def scale_to_one(largest: np.int32, width: int, nodes: Floats, scale: Floats) -> None:
    """Scale finite nodes (N, D), of which `width` columns count, to length 1; `scale` is that of :func:`directions`."""
    size = len(nodes)
    peak = np.int32(largest).view(np.float32)
    empty = peak < TINY
    if empty:
        peak = ONE
    mean = ZERO
    for p in range(size):
        square = ZERO
        for c in range(width):
            value = nodes[p, c] / peak
            nodes[p, c] = value
            square += value * value
        scale[1, p] = square
        mean += square
    least = ONE if empty else SHORTEST * mean / np.float32(size)
    for p in range(size):
        square = scale[1, p]
        factor = ONE / np.sqrt(max(square, least))
        for c in range(width):
            nodes[p, c] *= factor
        scale[0, p] = ZERO if empty else factor / peak
        scale[1, p] = ONE if square > least else ZERO


@compiled
def half_squares(own: Floats, other: Floats, width: int, cost: Floats) -> None:
    """Write half the squared distances between the rows of two matrices (N, D) into `cost` (N, N).

    Of the rows the first `width` columns count. Two rows of either side at a time: half the reads.
    """
    size, half = len(own), np.float32(0.5)
    for p in range(0, size, 2):
        below = min(p + 1, size - 1)
        for q in range(0, size, 2):
            right = min(q + 1, size - 1)
            same, down, across, both = ZERO, ZERO, ZERO, ZERO
            for c in range(width):
                first, second, third, fourth = own[p, c], own[below, c], other[q, c], other[right, c]
                same += (first - third) * (first - third)
                across += (first - fourth) * (first - fourth)
                down += (second - third) * (second - third)
                both += (second - fourth) * (second - fourth)
            cost[p, q], cost[p, right] = same * half, across * half
            cost[below, q], cost[below, right] = down * half, both * half


@compiled
def pull(own: Floats, other: Floats, column: Ints, width: int, scale: Floats, gradient: Floats) -> None:
    """Write the gradient of the mean cost of matched directions with respect to the nodes of the first side, (N, D).

    Args:
        own, other: the directions, shape (N, D).
        column: the row of `other` that each of `own` is matched with, shape (N,).
        width: how many columns count.
        scale: of the first side, see :func:`directions`.
        gradient: result.
    """
    size = len(own)
    for p in range(size):
        q, along, share = column[p], ZERO, scale[0, p] / np.float32(size)
        for c in range(width):
            along += (own[p, c] - other[q, c]) * own[p, c]
        along *= scale[1, p]
        for c in range(width):
            gradient[p, c] = (own[p, c] - other[q, c] - along * own[p, c]) * share


def load(*, cached: bool) -> Callable[..., None]:
    """Return :func:`cosine_distances`, compiled and tried; see :func:`sfr.transport.numba_functions.tried`."""
    return tried(cosine_distances, _tried_on_two_nodes, [0.5, True, [[0.0, -0.5], [0.0, 0.0]]], cached)


def _tried_on_two_nodes(kernel: Callable[..., None]) -> list[Any]:
    """Return what is found of the nodes (1, 0) and (0, 1), and a deep side that has the second twice."""
    nodes = np.array([1, 0, 0, 1, 0, 1, 0, 1], np.float32)
    starts, widths, pairs = np.array([0, 4]), np.array([2, 2]), np.array([[0, 1]])
    values, finite = np.empty((1, 1), np.float32), np.empty((1, 1), np.bool_)
    gradients = np.empty((1, 1, 2, 2), np.float32)
    kernel(nodes, starts, widths, pairs, 0, 1, values, finite, gradients)
    return [float(values[0, 0]), bool(finite[0, 0]), gradients[0, 0].tolist()]
