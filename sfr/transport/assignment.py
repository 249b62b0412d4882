"""Batched assignment problems compiled by numba: the algorithm of Jonker and Volgenant in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

INFINITY = np.float32(np.inf)
NEVER = np.int32(2**31 - 1)  # above the bits of every float
ALWAYS = np.int32(-(2**31))  # below them
TINY = np.float32(np.finfo(np.float32).tiny)

# Every inner loop runs over the columns of one row without a branch, so that it becomes vector instructions. LLVM does
# that for minima of integers and not of floats, hence the minima over the bits of the distances: floats >= 0 have the
# order of their bits.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz", "reassoc", "contract"},
}
compiled = njit(**OPTIONS)


@compiled
def assign(costs: Floats, columns: Ints, prices: Floats) -> None:
    """Write the column assigned to each row of each problem, of least total cost, into `columns`.

    Rows and columns are matched greedily by reduced cost first; each row left over is then matched along a shortest
    augmenting path (Dijkstra), which keeps the dual prices feasible and so ends in an optimum. The work of a problem is
    bounded by N**3. The GIL is released.

    Args:
        costs: finite costs, contiguous, shape (B, N, N).
        columns: result, shape (B, N).
        prices: result, the dual prices of the columns, shape (B, N): row p of the plan is at the minimum of
            ``costs[p] - prices``.

    Reference:
        Jonker & Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems,
        Computing 38, 1987.
    """
    size = costs.shape[1]
    distance, final, open_prices = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    rows, previous, owned = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    bits = distance.view(np.int32)
    cost = np.empty((size, size), np.float32)
    for problem in range(len(costs)):
        column, price = columns[problem], prices[problem]
        scale = scaled(costs[problem], cost)
        column_reduction(cost, price, column, rows, previous)
        row_reduction(cost, price, column, rows, distance, bits)
        for j in range(size):
            owned[j] = NEVER if rows[j] >= 0 else ALWAYS
        for row in range(size):
            if column[row] < 0:
                augment(row, cost, price, column, rows, owned, distance, bits, final, open_prices, previous)
        for j in range(size):
            price[j] *= scale


def load(*, cached: bool) -> Callable[[Floats, Ints, Floats], None]:
    """Return :func:`assign`, compiled and tried on a small problem.

    Args:
        cached: read the machine code from numba's cache on disk, and write it there.

    Raises:
        Exception: of any kind, if numba cannot compile, or cannot use its cache.
    """
    if getattr(config, "DISABLE_JIT", False):  # in Python it would be slower than scipy
        raise RuntimeError("numba's compiler is switched off (NUMBA_DISABLE_JIT)")
    solver = njit(cache=True, **OPTIONS)(assign.py_func) if cached else assign
    columns, prices = np.empty((1, 3), np.int32), np.empty((1, 3), np.float32)
    solver(np.array([[[2, 1, 3], [1, 3, 2], [3, 2, 1]]], np.float32), columns, prices)
    if columns.tolist() != [[1, 0, 2]]:
        raise RuntimeError(f"it found {columns.tolist()} where [[1, 0, 2]] is right")
    return solver


@compiled
def scaled(costs: Floats, result: Floats) -> Any:
    """Bring costs of any scale to order one, where sums and differences stay finite; return the scale."""
    peak = np.full(1, TINY)
    bits = peak.view(np.int32)
    for row in range(len(costs)):
        values, largest = costs[row].view(np.int32), bits[0]
        for j in range(len(values)):
            largest = max(largest, values[j] & NEVER)
        bits[0] = largest
    scale = peak[0]
    for row in range(len(costs)):
        for j in range(len(costs)):
            result[row, j] = costs[row, j] / scale
    return scale


@compiled
def column_reduction(cost: Floats, prices: Floats, column: Ints, rows: Ints, cheapest: Ints) -> None:
    """Price each column at its cheapest entry and match it with that row, if the row is still free."""
    size = len(prices)
    prices[:] = cost[0]
    cheapest[:] = 0
    column[:] = -1
    rows[:] = -1
    for row in range(1, size):
        for j in range(size):
            less = cost[row, j] < prices[j]
            prices[j] = cost[row, j] if less else prices[j]
            cheapest[j] = np.int32(row) if less else cheapest[j]
    for j in range(size - 1, -1, -1):
        if column[cheapest[j]] < 0:
            column[cheapest[j]] = j
            rows[j] = cheapest[j]


@compiled
def row_reduction(cost: Floats, prices: Floats, column: Ints, rows: Ints, reduced: Floats, bits: Ints) -> None:
    """Give each free row its best column once, at the price that makes the second best as good for it."""
    size = len(prices)
    for row in range(size):
        if column[row] >= 0:
            continue
        for j in range(size):
            reduced[j] = cost[row, j] - prices[j]
        first = position(bits, least(bits))
        best = reduced[first]
        reduced[first] = INFINITY
        second = position(bits, least(bits))
        taken = first
        if reduced[second] > best:
            prices[first] -= reduced[second] - best
        elif rows[first] >= 0:
            taken = second  # as good, and perhaps free
        if rows[taken] >= 0:
            column[rows[taken]] = -1
        rows[taken] = row
        column[row] = taken


@compiled
def augment(
    start: int,
    cost: Floats,
    prices: Floats,
    column: Ints,
    rows: Ints,
    owned: Ints,
    distance: Floats,
    bits: Ints,
    final: Floats,
    open_prices: Floats,
    previous: Ints,
) -> None:
    """Match the free row `start` along the shortest path of reduced costs to a free column.

    `bits` is `distance` seen as integers. A column whose distance is final keeps it in `final`; an infinite distance
    and an infinite price keep it out of the search. `owned` is NEVER for the matched columns, ALWAYS for the others.
    """
    size = len(prices)
    for j in range(size):
        open_prices[j] = prices[j]
        distance[j] = cost[start, j] - prices[j]
        previous[j] = np.int32(start)
        final[j] = INFINITY
    while True:
        nearest, nearest_free = NEVER, NEVER
        for j in range(size):
            nearest = min(nearest, bits[j])
            nearest_free = min(nearest_free, max(bits[j], owned[j]))
        end = position(bits, nearest)
        shortest = distance[end]
        if nearest_free == nearest:  # among equals a free column ends the search
            break
        final[end] = shortest
        distance[end] = INFINITY
        open_prices[end] = -INFINITY
        row = rows[end]
        shift = cost[row, end] - prices[end] - shortest
        for j in range(size):
            through = cost[row, j] - open_prices[j] - shift
            nearer = through < distance[j]
            distance[j] = through if nearer else distance[j]
            previous[j] = row if nearer else previous[j]
    while rows[end] >= 0 or bits[end] != nearest:
        end += 1
    owned[end] = NEVER
    for j in range(size):
        prices[j] += min(final[j] - shortest, np.float32(0))
    while True:
        row = previous[end]
        rows[end] = row
        end, column[row] = column[row], end
        if row == start:
            break


@compiled
def least(bits: Ints) -> Any:
    """Return the least value."""
    lowest = NEVER
    for j in range(len(bits)):
        lowest = min(lowest, bits[j])
    return lowest


@compiled
def position(values: Ints, value: np.int32) -> Any:
    """Return the first index of a value that the array contains."""
    size = np.int32(len(values))
    index = size
    for j in range(size):
        index = min(index, np.int32(j) if values[j] == value else size)
    return index
