"""Exact plans on the CPU: an assignment solver where the problem is one, POT's network simplex elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIMPLEX_ITERATIONS = 1_000_000

# Below these sizes threads cost more than they bring: entries of the batch for the compiled solver, and of a single
# cost matrix for the solvers called once per problem, which hand the GIL to and fro.
COMPILED_THREADED_FROM = 2**19
LOOP_THREADED_FROM = 36 * 36

HAS_NUMBA = importlib.util.find_spec("numba") is not None


def exact_plan(cost: Tensor, rows: Tensor, columns: Tensor, *, uniform: bool) -> Tensor:
    """Return the optimal plans of a batch of problems, computed on the CPU.

    With uniform masses and N = M an optimal plan is a permutation (Birkhoff). For float32 costs a solver compiled by
    numba (``pip install sfr[fast]``) finds it, several times faster than scipy's assignment solver (Crouse 2016), which
    takes its place where numba is missing and for float64. Every other problem goes to POT's network simplex (Bonneel
    et al. 2011). All of them release the GIL, and large batches are shared out over ``torch.get_num_threads()``.

    Args:
        cost: finite costs, shape (B, N, M).
        rows: masses, shape (B, N), each row of sum 1.
        columns: masses, shape (B, M), each row of sum 1.
        uniform: whether all masses of a side are equal.

    Returns:
        Plans of shape (B, N, M) with the dtype and device of `cost`.
    """
    if uniform and cost.shape[1] == cost.shape[2]:
        compiled = HAS_NUMBA and cost.dtype == torch.float32
        matches = torch.from_numpy(_compiled_assignment(cost) if compiled else _scipy_assignment(cost))
        plan = torch.zeros_like(cost, memory_format=torch.contiguous_format)
        return plan.scatter_(2, matches.to(cost.device, torch.int64)[:, :, None], 1.0 / cost.shape[1])
    return _simplex(cost, rows, columns)


def _compiled_assignment(cost: Tensor) -> NDArray[np.int32]:
    """Return the column of each row, (B, N)."""
    from sfr.transport.assignment import assign

    # A scale of order one, which moves no assignment, keeps sums and differences of costs finite.
    scale = cost.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cost.dtype).tiny)
    costs = (cost / scale).cpu().contiguous().numpy()
    matches = np.empty(costs.shape[:2], np.int32)
    threads = torch.get_num_threads() if costs.size >= COMPILED_THREADED_FROM else 1
    _in_threads(lambda part: assign(costs[part], matches[part]), len(costs), threads)
    return matches


def _scipy_assignment(cost: Tensor) -> NDArray[np.int32]:
    """Return the column of each row, (B, N)."""
    from scipy.optimize import linear_sum_assignment

    costs = cost.to("cpu", torch.float64).numpy()
    matches = np.empty(costs.shape[:2], np.int32)

    def solve(part: slice) -> None:
        for problem, columns in zip(costs[part], matches[part], strict=True):
            columns[:] = linear_sum_assignment(problem)[1]

    _in_threads(solve, len(costs), _loop_threads(costs))
    return matches


def _simplex(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the plans, (B, N, M), for any masses."""
    import ot  # loads every array library it finds: not before it is needed

    costs = cost.to("cpu", torch.float64).numpy()
    plans = np.empty_like(costs)
    a, b = _float64_masses(rows), _float64_masses(columns)

    def solve(part: slice) -> None:
        for i in range(part.start, part.stop):
            # The simplex compares with absolute tolerances: bring costs of any scale to order one.
            scale = np.abs(costs[i]).max() or 1.0
            plans[i], log = ot.emd(a[i], b[i], costs[i] / scale, numItermax=SIMPLEX_ITERATIONS, log=True)
            if log["warning"] is not None:
                raise RuntimeError(f"POT's network simplex failed on a {costs[i].shape} problem: {log['warning']}")

    _in_threads(solve, len(costs), _loop_threads(costs))
    return torch.from_numpy(plans).to(cost)


def _float64_masses(masses: Tensor) -> NDArray[np.float64]:
    """Masses whose sums agree to float64 rounding, as the simplex needs them."""
    exact = masses.to("cpu", torch.float64)
    return (exact / exact.sum(dim=1, keepdim=True)).numpy()


def _loop_threads(costs: NDArray[Any]) -> int:
    return torch.get_num_threads() if costs[:1].size >= LOOP_THREADED_FROM else 1


def _in_threads(solve: Callable[[slice], None], count: int, threads: int) -> None:
    """Call `solve` with slices that cover the `count` problems of a batch, one slice per thread."""
    if threads == 1:
        return solve(slice(0, count))
    bounds = np.linspace(0, count, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(solve, slice(*ends)) for ends in pairwise(bounds)]:
            done.result()
    return None
