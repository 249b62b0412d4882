"""Batched assignment problems compiled by numba: the algorithm of Jonker and Volgenant in float32."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

INFINITY = np.float32(np.inf)

# Every inner loop runs over the columns of one row without a branch, so that it becomes vector instructions. That
# needs minima without regard for NaN; infinities are used, so they stay allowed.
compiled = njit(
    nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"nnan", "nsz", "reassoc", "contract"}
)


@compiled
def assign(costs: Floats, columns: Ints) -> None:
    """Write the column assigned to each row of each problem, of least total cost, into `columns`.

    Rows and columns are matched greedily by reduced cost first; each row left over is then matched along a shortest
    augmenting path (Dijkstra), which keeps the dual prices feasible and so ends in an optimum. The work of a problem is
    bounded by N**3. The GIL is released.

    Args:
        costs: costs of order one, finite, contiguous, shape (B, N, N).
        columns: result, shape (B, N).

    Reference:
        Jonker & Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems,
        Computing 38, 1987.
    """
    size = costs.shape[1]
    prices, distance = np.empty(size, np.float32), np.empty(size, np.float32)
    closed, owned = np.empty(size, np.float32), np.empty(size, np.float32)
    reduced = np.empty(size, np.float32)
    rows, previous = np.empty(size, np.int32), np.empty(size, np.int32)
    for problem in range(len(costs)):
        cost, column = costs[problem], columns[problem]
        column_reduction(cost, prices, column, rows, previous)
        row_reduction(cost, prices, column, rows, reduced)
        for j in range(size):
            owned[j] = INFINITY if rows[j] >= 0 else np.float32(0)
        for row in range(size):
            if column[row] < 0:
                augment(row, cost, prices, column, rows, distance, closed, owned, reduced, previous)


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
def row_reduction(cost: Floats, prices: Floats, column: Ints, rows: Ints, reduced: Floats) -> None:
    """Give each free row its best column once, at the price that makes the second best as good for it."""
    size = len(prices)
    for row in range(size):
        if column[row] >= 0:
            continue
        best = INFINITY
        for j in range(size):
            reduced[j] = cost[row, j] - prices[j]
            best = min(best, reduced[j])
        first = position(reduced, best)
        reduced[first] = INFINITY
        second = INFINITY
        for j in range(size):
            second = min(second, reduced[j])
        taken = first
        if second > best:
            prices[first] -= second - best
        elif rows[first] >= 0:
            taken = position(reduced, second)  # as good, and perhaps free
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
    distance: Floats,
    closed: Floats,
    owned: Floats,
    reduced: Floats,
    previous: Ints,
) -> None:
    """Match the free row `start` along the shortest path of reduced costs to a free column.

    `closed` and `owned` are infinite for the columns already reached for good, and those matched, zero for the others.
    """
    size = len(prices)
    for j in range(size):
        distance[j] = cost[start, j] - prices[j]
        previous[j] = np.int32(start)
        closed[j] = np.float32(0)
    while True:
        nearest, nearest_free = INFINITY, INFINITY
        for j in range(size):
            reduced[j] = distance[j] + closed[j]
            nearest = min(nearest, reduced[j])
            nearest_free = min(nearest_free, reduced[j] + owned[j])
        end = position(reduced, nearest)
        if nearest_free == nearest:  # among equals a free column ends the search
            while rows[end] >= 0 or reduced[end] != nearest:
                end += 1
            owned[end] = INFINITY
            break
        closed[end] = INFINITY
        row = rows[end]
        shift = cost[row, end] - prices[end] - nearest
        for j in range(size):
            through = cost[row, j] - prices[j] - shift + closed[j]
            nearer = through < distance[j]
            distance[j] = through if nearer else distance[j]
            previous[j] = row if nearer else previous[j]
    for j in range(size):
        if closed[j] == INFINITY:
            prices[j] += distance[j] - nearest
    while True:
        row = previous[end]
        rows[end] = row
        end, column[row] = column[row], end
        if row == start:
            break


@compiled
def position(values: Floats, value: np.float32) -> int:
    """Return the first index of a value that is known to be there."""
    index = 0
    while values[index] != value:
        index += 1
    return index
