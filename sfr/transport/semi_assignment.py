"""Batched transport of equal masses from N = kM nodes to M, compiled by numba: k rows to each column, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sfr.transport.assignment import (
    ALWAYS,
    INFINITY,
    NEVER,
    ZERO,
    Ints,
    bits,
    fill,
    position,
    price_columns,
)
from sfr.transport.numba_functions import OPTIONS, Floats, column_of_each, compiled, tried


@njit(**OPTIONS)
def assign_groups(costs: Floats, plans: Floats, prices: Floats) -> None:
    """Write the plan of least total cost of each problem, N/M rows to each column times 1/N, into `plans`.

    Each row takes its cheapest column by reduced cost, as long as there is room; each row left over takes a shortest
    augmenting path (Dijkstra) over the columns, which keeps the dual prices feasible and so ends in an optimum. The
    work of a problem is bounded by N**2 M. A problem whose costs are not all finite gets the independent coupling. The
    GIL is released.

    Args:
        costs: costs, contiguous, shape (B, N, M), N a multiple of M.
        plans: zeros, to be filled, shape (B, N, M).
        prices: result, the dual prices of the columns, shape (B, M): row p of the plan is at the minimum of
            ``costs[p] - prices``. Where costs are not finite, it is left alone.

    Reference:
        Kennington & Wang, A Shortest Augmenting Path Algorithm for the Semi-Assignment Problem, Operations Research 40,
        1992.
    """
    count, size = costs.shape[1], costs.shape[2]
    share = np.float32(1 / count)
    distance, final, open_prices = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    owned, previous, taken = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    column, members = np.empty(count, np.int32), np.empty((size, count // size), np.int32)
    scaled = np.empty((count, size), np.float32)
    for problem in range(len(costs)):
        cost, price, plan = costs[problem], prices[problem], plans[problem]
        unit = price_columns(cost, scaled, price, previous)
        if unit == 0:
            fill(plan, share / np.float32(size))
            continue
        if unit != 1:
            cost = scaled
        for j in range(size):
            taken[j], owned[j] = 0, ALWAYS
        for row in range(count):
            take_cheapest(row, cost, price, column, members, taken, owned, distance)
        for row in range(count):
            if column[row] < 0:
                end = search(row, cost, price, members, taken, owned, distance, final, open_prices, previous)
                shift_along(row, end, column, members, taken, owned, previous)
        for row in range(count):
            plan[row, column[row]] = share
        for j in range(size):
            price[j] *= unit


def load(*, cached: bool) -> Callable[[Floats, Floats, Floats], None]:
    """Return :func:`assign_groups`, compiled and tried; see :func:`sfr.transport.numba_functions.tried`."""
    trial = [[1, 2], [1, 4], [1, 5], [3, 1]]
    return tried(assign_groups, lambda kernel: column_of_each(trial, kernel), [1, 0, 0, 1], cached)


@compiled
def take_cheapest(
    row: int, cost: Floats, prices: Floats, column: Ints, members: Ints, taken: Ints, owned: Ints, reduced: Floats
) -> None:
    """Give a row its cheapest column, if that has room."""
    least = NEVER
    for j in range(len(prices)):
        reduced[j] = cost[row, j] - prices[j]
        least = min(least, bits(reduced[j]))
    cheapest = position(reduced, least)
    column[row] = -1
    if owned[cheapest] != NEVER:
        column[row] = cheapest
        join(row, cheapest, members, taken, owned)


@compiled
def join(row: int, column: int, members: Ints, taken: Ints, owned: Ints) -> None:
    """Put a row into a column that has room."""
    members[column, taken[column]] = row
    taken[column] += 1
    if taken[column] == members.shape[1]:
        owned[column] = NEVER


@compiled
def search(
    start: int,
    cost: Floats,
    prices: Floats,
    members: Ints,
    taken: Ints,
    owned: Ints,
    distance: Floats,
    final: Floats,
    open_prices: Floats,
    previous: Ints,
) -> Any:
    """Return the column with room that is nearest to the row `start` by reduced costs, and update the prices.

    `previous` is the row before each column on its path. A column whose distance is final keeps it in `final`; an
    infinite distance and an infinite price keep it out of the search. `owned` is NEVER for full columns, ALWAYS for the
    others.
    """
    size = len(prices)
    for j in range(size):
        open_prices[j], final[j], previous[j] = prices[j], INFINITY, np.int32(start)
        distance[j] = cost[start, j] - prices[j]
    while True:
        nearest, nearest_free = NEVER, NEVER
        for j in range(size):
            nearest = min(nearest, bits(distance[j]))
            nearest_free = min(nearest_free, max(bits(distance[j]), owned[j]))
        end = position(distance, nearest)
        shortest = distance[end]
        if nearest == nearest_free:  # among equals a column with room ends the search
            break
        final[end] = shortest
        distance[end] = INFINITY
        open_prices[end] = -INFINITY
        for k in range(taken[end]):
            row = members[end, k]
            shift = cost[row, end] - prices[end] - shortest
            for j in range(size):
                through = cost[row, j] - open_prices[j] - shift
                nearer = through < distance[j]
                distance[j] = through if nearer else distance[j]
                previous[j] = row if nearer else previous[j]
    while owned[end] == NEVER or bits(distance[end]) != nearest:
        end += 1
    for j in range(size):
        prices[j] += min(final[j] - shortest, ZERO)
    return end


@compiled
def shift_along(start: int, end: int, column: Ints, members: Ints, taken: Ints, owned: Ints, previous: Ints) -> None:
    """Move each row of the path from the row `start` to the column `end` one column on."""
    row = previous[end]
    join(row, end, members, taken, owned)
    while row != start:
        left = column[row]
        column[row] = end
        place = 0
        while members[left, place] != row:
            place += 1
        end, row = left, previous[left]
        members[end, place] = row
    column[row] = end
