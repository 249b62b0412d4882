"""Exact plans on the CPU: an assignment solver where the problem is one, POT's network simplex elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfr.transport.fallback import OptionalSolver
from sfr.transport.scaling import round_to_marginals

Floats = NDArray[np.float64]

SIMPLEX_ITERATIONS = 1_000_000
OPTIMAL = 1  # the simplex's code of success

# Below these sizes threads cost more than they save: number of entries in the batch for the compiled solver, and in
# one cost matrix for the solvers that are called once per problem and take turns holding the GIL.
COMPILED_THREADED_FROM = 2**19
LOOP_THREADED_FROM = 36 * 36

NO_CACHE = (
    "numba cannot use its cache for the transport solver and compiles it in every process, which takes seconds. To "
    "avoid that, set NUMBA_CACHE_DIR to an empty folder that this user may write to, on a disk with free space"
)
# Sums of this many costs and their differences still fit into float64.
HUGE, SHRINK = 2.0**960, 2.0**-60


def exact_plan(cost: Tensor, rows: Tensor, columns: Tensor, *, uniform: bool) -> Tensor:
    """Return the optimal plans of a batch of problems, computed on the CPU.

    With uniform masses and N = M an optimal plan is a permutation (Birkhoff): scipy's assignment solver (Crouse 2016)
    finds it where :func:`whole_plan` does not. Every other problem goes to POT's network simplex (Bonneel et al.
    2011). Both release the GIL, and large batches are shared out over ``torch.get_num_threads()``.

    Args:
        cost: finite costs, shape (B, N, M).
        rows: masses, shape (B, N), each row of sum 1.
        columns: masses, shape (B, M), each row of sum 1.
        uniform: whether all masses of a side are equal.

    Returns:
        Plans of shape (B, N, M) with the dtype and device of `cost`.
    """
    if uniform and cost.shape[1] == cost.shape[2]:
        matches = torch.from_numpy(_scipy_assignment(cost))
        plan = torch.zeros_like(cost, memory_format=torch.contiguous_format)
        return plan.scatter_(2, matches.to(cost.device, torch.int64)[:, :, None], 1.0 / cost.shape[1])
    return _simplex(cost, rows, columns)


def whole_plan(cost: Tensor) -> Tensor | None:
    """Return the optimal plans for uniform masses where no node of the larger side need be split.

    Solvers compiled by numba (the extra ``fast``) find them, several times faster than those of scipy and POT, and see
    by themselves which costs are finite.

    Args:
        cost: shape (B, N, M), N a multiple of M or M one of N, of any floating dtype, solved in float32. A problem
            whose costs are not all finite gets the independent coupling.

    Returns:
        Plans of shape (B, N, M) in float32, on the device of `cost`; or None if numba is missing or does not work.
    """
    n, m = cost.shape[1:]
    costs = cost.float() if n >= m else cost.float().mT
    plans = compiled_assignment(np.ascontiguousarray(costs.numpy(force=True)))
    if plans is None:
        return None
    plan = torch.from_numpy(plans).to(cost.device)
    return plan if n >= m else plan.mT.contiguous()


def _load_assignment() -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return the solver compiled by numba; its two parts, for N = M and N = kM, are loaded when first needed."""

    @cache
    def part(square: bool) -> Callable[..., None]:
        if square:
            from sfr.transport.assignment import load
        else:
            from sfr.transport.semi_assignment import load
        return loaded(load)

    return lambda costs: _assigned(part(costs.shape[1] == costs.shape[2]), costs)


def loaded(load: Callable[..., Callable[..., None]]) -> Callable[..., None]:
    """Return a compiled function by numba's cache or, with a warning, without it; `load` takes ``cached``."""
    try:
        return load(cached=True)
    except Exception as error:
        kernel = load(cached=False)  # if this fails, too, it was not the cache
        warnings.warn(f"{NO_CACHE}. The reason: {error!r}", stacklevel=5)
        return kernel


compiled_assignment = OptionalSolver(
    "numba",
    _load_assignment,
    "numba does not work here, so scipy and POT solve the transport problems, several times slower",
)


def _assigned(assign: Callable[..., None], costs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the plans, (B, N, N), of the compiled solver."""
    plans, prices = np.zeros(costs.shape, np.float32), np.empty(costs.shape[::2], np.float32)
    threads = torch.get_num_threads() if costs.size >= COMPILED_THREADED_FROM else 1
    in_threads(lambda part: assign(costs[part], plans[part], prices[part]), len(costs), threads)
    return plans


def _scipy_assignment(cost: Tensor) -> NDArray[np.int32]:
    """Return the column of each row, (B, N), by scipy."""
    from scipy.optimize import linear_sum_assignment

    cost64 = cost.to("cpu", torch.float64)
    huge = cost64.abs().amax(dim=(1, 2), keepdim=True) > HUGE
    costs = torch.where(huge, cost64 * SHRINK, cost64).numpy()  # exact, but for what such a cost makes negligible
    matches = np.empty(costs.shape[:2], np.int32)

    def solve(part: slice) -> None:
        for problem, columns in zip(costs[part], matches[part], strict=True):
            columns[:] = linear_sum_assignment(problem)[1]

    in_threads(solve, len(costs), _loop_threads(costs))
    return matches


def _simplex(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the plans, (B, N, M), for any masses."""
    run = _simplex_solver()
    costs = cost.numpy(force=True)
    # The simplex compares with absolute tolerances: bring costs of any scale to order one.
    largest = np.abs(costs).max(axis=(1, 2), initial=0).astype(np.float64)
    largest[largest == 0] = 1
    a, b = _float64_masses(rows), _float64_masses(columns)
    plans = np.empty(costs.shape, costs.dtype)
    unsolved: list[int] = []

    def solve(part: slice) -> None:
        scaled = np.empty(costs.shape[1:], np.float64)
        for i in range(part.start, part.stop):
            np.divide(costs[i], largest[i], out=scaled)
            plans[i], solved = run(a[i], b[i], scaled, SIMPLEX_ITERATIONS)
            if not solved:
                unsolved.append(i)

    in_threads(solve, len(costs), _loop_threads(costs))
    if unsolved:
        warnings.warn(
            f"the network simplex did not solve {len(unsolved)} of {len(costs)} problems of shape {costs.shape[1:]} in "
            f"{SIMPLEX_ITERATIONS} iterations; their plans are feasible and not optimal",
            stacklevel=2,
        )
        tensors = (torch.from_numpy(each[unsolved]).double() for each in (plans, a, b))
        plans[unsolved] = round_to_marginals(*tensors).numpy()
    return torch.from_numpy(plans).to(cost)


@cache
def _simplex_solver() -> Callable[[Floats, Floats, Floats, int], tuple[Floats, bool]]:
    """Return POT's network simplex: plan and success from masses (N,) and (M,), costs (N, M) and an iteration limit.

    POT's compiled function saves the Python code around each problem, which takes longer than solving a small one. Its
    name is not public: if it is missing or behaves differently, the public function is used instead.
    """
    import ot  # loads every array library it finds: not before it is needed

    def public(a: Floats, b: Floats, cost: Floats, iterations: int) -> tuple[Floats, bool]:
        plan, log = ot.emd(a, b, cost, numItermax=iterations, log=True)
        return plan, log["warning"] is None

    def compiled(a: Floats, b: Floats, cost: Floats, iterations: int) -> tuple[Floats, bool]:
        plan, *_, code = emd_c(a, b, cost, iterations, 1)
        return plan, code == OPTIMAL

    try:
        from ot.lp.emd_wrap import emd_c

        half, cost = np.full(2, 0.5), np.array([[1.0, 0.0], [0.0, 1.0]])
        plan, solved = compiled(half, half, cost, 100)
        fits = solved and np.array_equal(plan, 0.5 - 0.5 * cost)
    except Exception:  # whatever another release does in its place
        fits = False
    return compiled if fits else public


def _float64_masses(masses: Tensor) -> Floats:
    """Masses whose sums agree to float64 rounding, as the simplex needs them."""
    exact = masses.to("cpu", torch.float64)
    return (exact / exact.sum(dim=1, keepdim=True)).numpy()


def _loop_threads(costs: Floats) -> int:
    return torch.get_num_threads() if costs[:1].size >= LOOP_THREADED_FROM else 1


def in_threads(solve: Callable[[slice], None], count: int, threads: int) -> None:
    """Call `solve` with slices that cover the `count` problems of a batch, one slice per thread."""
    if threads == 1:
        return solve(slice(0, count))
    first, *others = [slice(*ends) for ends in pairwise(np.linspace(0, count, threads + 1).astype(int))]
    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(solve, part) for part in others]
        solve(first)
        for each in running:
            each.result()
    return None
