"""Batched assignment problems compiled by numba: the algorithm of Jonker and Volgenant in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sfr.transport.numba_functions import OPTIONS, Floats, column_of_each, compiled, tried

Ints = NDArray[np.int32]

INFINITY = np.float32(np.inf)
ZERO = np.float32(0)
NEVER = np.int32(2**31 - 1)  # above the bits of every float
ALWAYS = np.int32(-(2**31))  # below them
# Costs whose largest lies between these are taken as they are: sums and differences stay finite, and exact to rounding.
SMALL, LARGE = np.float32(2.0**-60), np.float32(2.0**60)
SMALL_BITS, LARGE_BITS = SMALL.view(np.int32), LARGE.view(np.int32)
INFINITE_BITS = INFINITY.view(np.int32)


@njit(**OPTIONS)
def assign(costs: Floats, plans: Floats, prices: Floats) -> None:
    """Write the plan of least total cost of each problem, a permutation times 1/N, into `plans`.

    Rows and columns are matched greedily by reduced cost first; each row left over is then matched along a shortest
    augmenting path (Dijkstra), which keeps the dual prices feasible and so ends in an optimum. The work of a problem is
    bounded by N**3. A problem whose costs are not all finite gets the independent coupling. The GIL is released.

    Args:
        costs: costs, contiguous, shape (B, N, N).
        plans: zeros, to be filled, shape (B, N, N).
        prices: result, the dual prices of the columns, shape (B, N): row p of the plan is at the minimum of
            ``costs[p] - prices``. Where costs are not finite, it is left alone.

    Reference:
        Jonker & Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems,
        Computing 38, 1987.
    """
    size = costs.shape[1]
    share = np.float32(1 / size)
    distance, final, open_prices = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    rows, previous, owned = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    column, scaled = np.empty(size, np.int32), np.empty((size, size), np.float32)
    for problem in range(len(costs)):
        cost, price, plan = costs[problem], prices[problem], plans[problem]
        unit = match(cost, price, column, scaled, distance, final, open_prices, rows, previous, owned)
        if unit == 0:
            fill(plan, share * share)
            continue
        for row in range(size):
            plan[row, column[row]] = share
            price[row] *= unit


@compiled
def match(
    cost: Floats,
    prices: Floats,
    column: Ints,
    scaled: Floats,
    distance: Floats,
    final: Floats,
    open_prices: Floats,
    rows: Ints,
    previous: Ints,
    owned: Ints,
) -> Any:
    """Write the column of each row of one problem (N, N) into `column`, and return the unit of the `prices`, both (N,).

    The unit is 0 if the costs are not finite; `column` is then meaningless. `scaled` (N, N) and the others (N,) are
    room to work in.
    """
    unit = price_columns(cost, scaled, prices, previous)
    if unit == 0:
        return unit
    if unit != 1:
        cost = scaled
    match_greedily(cost, prices, column, rows, previous, distance)
    for j in range(len(rows)):
        owned[j] = NEVER if rows[j] >= 0 else ALWAYS
    for row in range(len(rows)):
        if column[row] < 0:
            augment(row, cost, prices, column, rows, owned, distance, final, open_prices, previous)
    return unit


def load(*, cached: bool) -> Callable[[Floats, Floats, Floats], None]:
    """Return :func:`assign`, compiled and tried; see :func:`sfr.transport.numba_functions.tried`."""
    trial = [[2, 1, 3], [1, 3, 2], [3, 2, 1]]
    return tried(assign, lambda kernel: column_of_each(trial, kernel), [1, 0, 2], cached)


@compiled
def bits(value: np.float32) -> Any:
    """Return a float's bits as an integer."""
    return np.float32(value).view(np.int32)


@compiled
def price_columns(cost: Floats, scaled: Floats, prices: Floats, cheapest: Ints) -> Any:
    """Price each column at its cheapest entry, write that entry's row into `cheapest`, and return the unit of prices.

    It is 0 if the costs are not finite, and 1 if they are to be taken as they are. Otherwise `scaled` is the cost in
    that unit.
    """
    largest = column_minima(cost, prices, cheapest)
    if largest >= INFINITE_BITS:
        return np.float32(0)
    if SMALL_BITS <= largest <= LARGE_BITS:
        return np.float32(1)
    unit = SMALL if largest < SMALL_BITS else LARGE
    for row in range(len(cost)):
        for j in range(len(prices)):
            scaled[row, j] = cost[row, j] / unit
    column_minima(scaled, prices, cheapest)
    return unit


@compiled
def fill(plan: Floats, value: np.float32) -> None:
    """Make all entries equal."""
    for row in range(plan.shape[0]):
        for j in range(plan.shape[1]):
            plan[row, j] = value


@compiled
def match_greedily(cost: Floats, prices: Floats, column: Ints, rows: Ints, cheapest: Ints, reduced: Floats) -> None:
    """Match each column with its cheapest row, then each free row with its best column, as long as it pays."""
    match_columns(column, rows, cheapest)
    before, free = len(prices), unmatched(column)
    while 0 < 4 * free <= 3 * before:
        row_reduction(cost, prices, column, rows, reduced)
        before, free = free, unmatched(column)


@compiled
def column_minima(cost: Floats, prices: Floats, cheapest: Ints) -> Any:
    """Do as :func:`price_columns` does for costs of any size, and return the bits of the largest absolute cost.

    They are those of infinity or more if a cost is not finite.
    """
    size, largest = len(prices), np.int32(0)
    for j in range(size):
        prices[j], cheapest[j] = INFINITY, 0
    for row in range(0, len(cost), 2):  # two rows at a time: half the reads and writes of the prices
        upper, lower = np.int32(row), np.int32(min(row + 1, len(cost) - 1))
        for j in range(size):
            above, below = cost[upper, j], cost[lower, j]
            largest = max(largest, max(bits(above) & NEVER, bits(below) & NEVER))
            cheaper = below < above
            value, place = below if cheaper else above, lower if cheaper else upper
            less = value < prices[j]
            prices[j], cheapest[j] = value if less else prices[j], place if less else cheapest[j]
    return largest


@compiled
def match_columns(column: Ints, rows: Ints, cheapest: Ints) -> None:
    """Match each column with its cheapest row, if that row is still free."""
    for j in range(len(rows)):
        column[j], rows[j] = -1, -1
    for j in range(len(rows) - 1, -1, -1):
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
        least = NEVER
        for j in range(size):
            reduced[j] = cost[row, j] - prices[j]
            least = min(least, bits(reduced[j]))
        taken = position(reduced, least)
        best = reduced[taken]
        reduced[taken] = INFINITY
        least = NEVER
        for j in range(size):
            least = min(least, bits(reduced[j]))
        second = position(reduced, least)
        if reduced[second] > best:
            prices[taken] -= reduced[second] - best
        elif rows[taken] >= 0:
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
    final: Floats,
    open_prices: Floats,
    previous: Ints,
) -> None:
    """Match the free row `start` along the shortest path of reduced costs to a free column.

    A column whose distance is final keeps it in `final`; an infinite distance and an infinite price keep it out of the
    search. `owned` is NEVER for the matched columns, ALWAYS for the others.
    """
    size = len(prices)
    nearest, nearest_free = NEVER, NEVER
    for j in range(size):
        open_prices[j], final[j], previous[j] = prices[j], INFINITY, np.int32(start)
        reached = cost[start, j] - prices[j]
        distance[j] = reached
        nearest = min(nearest, bits(reached))
        nearest_free = min(nearest_free, max(bits(reached), owned[j]))
    while nearest != nearest_free:  # among equals a free column ends the search
        end = position(distance, nearest)
        shortest = distance[end]
        final[end] = shortest
        distance[end] = INFINITY
        open_prices[end] = -INFINITY
        row = rows[end]
        shift = cost[row, end] - prices[end] - shortest
        nearest, nearest_free = NEVER, NEVER
        for j in range(size):
            through = cost[row, j] - open_prices[j] - shift
            nearer = through < distance[j]
            reached = through if nearer else distance[j]
            distance[j] = reached
            previous[j] = row if nearer else previous[j]
            nearest = min(nearest, bits(reached))
            nearest_free = min(nearest_free, max(bits(reached), owned[j]))
    end = position(distance, nearest)
    while rows[end] >= 0 or bits(distance[end]) != nearest:
        end += 1
    shortest = distance[end]
    owned[end] = NEVER
    for j in range(size):
        prices[j] += min(final[j] - shortest, ZERO)
    while True:
        row = previous[end]
        rows[end] = row
        end, column[row] = column[row], end
        if row == start:
            break


@compiled
def unmatched(column: Ints) -> int:
    """Return the number of rows without a column."""
    count = 0
    for row in range(len(column)):
        count += column[row] < 0
    return count


@compiled
def position(values: Floats, wanted: np.int32) -> Any:
    """Return the first index of a value with these bits, which the array contains."""
    size = np.int32(len(values))
    index = size
    for j in range(size):
        index = min(index, np.int32(j) if bits(values[j]) == wanted else size)
    return index
