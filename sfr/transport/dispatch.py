"""solve(): one entry for every solver; it checks, normalises and dispatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfr.checks import check_choice, check_number
from sfr.config import Solver
from sfr.transport.exact import compiled_assignment, exact_plan, whole_plan
from sfr.transport.fallback import OptionalSolver
from sfr.transport.problem import Problem, masses_of, plan_dtype
from sfr.transport.proximal import ITERATIONS, default_beta, proximal_plan
from sfr.transport.scaling import duality_gap, of_unit_size
from sfr.transport.sinkhorn import sinkhorn_plan

HOST_UP_TO = 16  # nodes on a side of problems that the CPU solves for a device without Triton
FUSED_UP_TO = 64  # nodes on a side: the cost and the plan of a problem fit into the registers of one program


def _load_fused() -> Callable[..., Tensor]:
    from sfr.transport.fused import fused_plan

    return fused_plan


fused_solver = OptionalSolver(
    "triton", _load_fused, "the fused transport kernel does not run here, so a slower solver replaces it"
)


def solve(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    solver: Solver = "auto",
    *,
    epsilon: float = 0.02,
    beta: float | None = None,
    iterations: int = ITERATIONS,
) -> Tensor:
    r"""Solve a batch of optimal transport problems and return a plan with exactly the given marginals.

    .. math:: X^* = \arg\min_X \sum_{pq} X_{pq} C_{pq} \quad\text{s.t.}\quad X 1 = a,\; X^T 1 = b,\; X \ge 0

    The plan is a constant: no gradient flows through the solver. By the envelope theorem the gradient of
    ``(plan * cost).sum()`` through `cost` alone is the exact gradient of the transport cost.

    Compared with POT's ``ot.solve_batch``: the regularization is relative to each problem's own scale instead of one
    absolute value for all, the loop never waits for the device, every plan is rounded onto its marginals, and exact
    plans have the same interface. (As of POT 0.9.7, ``ot.solve_batch`` without ``reg`` returns the independent
    coupling.)

    Args:
        cost: ground cost, shape (B, N, M) or (N, M), any floating dtype, any scale, any sign. A problem whose cost is
            not finite gets the independent coupling ``a bᵀ / sum(a)``. "exact" is accurate to about 1e-6 of a problem's
            largest absolute cost, 1e-9 if that is float64.
        a: row masses, shape (B, N) or (N,), >= 0; default uniform ``1/N``.
        b: column masses, shape (B, M) or (M,), >= 0, with the same sum as `a`; default uniform ``1/M``. Sums that
            differ no more than by rounding of the masses' dtypes (a few 1e-6 for float32) count as equal: `b` is then
            scaled to the sum of `a`.
        solver: "exact"; "proximal" (0.01 to 0.06 % above the optimum on feature costs at N = 64) or "sinkhorn" (0.1 to
            0.2 %, and several times slower), both on the tensor's own device; "auto": exact for CPU tensors and, where
            Triton does not run, for up to 16 nodes a side, proximal elsewhere.
        epsilon: final regularization of "sinkhorn", relative to the standard deviation of the doubly centred cost.
        beta: step size of "proximal", likewise relative; None means 1 for uniform masses and N = M, else 2.
        iterations: number of iterations of "proximal" and "sinkhorn".

    Returns:
        The plan, shape of `cost`; float64 for a float64 cost, else float32; on the device of `cost`.

    Raises:
        TypeError: if `cost` is not a floating-point tensor, or a mass not a tensor of real numbers.
        ValueError: for wrong shapes, an unknown solver, and (checked on the CPU only, to avoid a device sync) for
            negative or non-finite masses, and sums of `a` and `b` that differ by more than rounding or overflow.

    Reference:
        Peyré & Cuturi, Computational Optimal Transport, 2019. Flamary et al., POT: Python Optimal Transport, 2021.

    Example:
        >>> solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    batch = _checked(cost, solver, epsilon, beta, iterations)
    if torch.compiler.is_compiling():
        plan = _compiled_plan(batch, a, b, solver, epsilon, beta, iterations)
    else:
        plan = _plan(batch, a, b, solver, epsilon, beta, iterations)
    return plan if cost.ndim == 3 else plan[0]


def certified(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    solver: Solver = "auto",
    *,
    epsilon: float = 0.02,
    beta: float | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    r"""Return the plans of an iterative solver, and how far above the optimum each may be.

    The bound is the distance of the plan's cost from the value of a feasible dual, relative to the plan's cost. It
    includes rounding, and holds for costs of any scale. On feature costs it is about the true gap with uniform masses,
    and up to ten times the true gap with other masses. It is a tensor on the device of the cost, so that nothing waits
    for it: read it whenever you synchronise anyway.

    Args:
        cost, a, b, epsilon, beta, iterations: see :func:`solve`.
        solver: "proximal" or "sinkhorn"; "auto" means proximal here. An exact plan needs no certificate.

    Returns:
        The plans, shape of `cost`, and the bounds, shape (B,), or () for one problem: infinite where the cost is not
        finite.

    Raises:
        TypeError, ValueError: as :func:`solve`, and for ``solver="exact"``.

    Example:
        >>> plan, gap = certified(torch.rand(8, 16, 16))
        >>> bool((gap < 0.01).all())
        True
    """
    if solver == "exact":
        raise ValueError("solver must be 'auto', 'proximal' or 'sinkhorn' for a certificate; got 'exact'")
    batch = _checked(cost, solver, epsilon, beta, iterations)
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        problem = Problem.of(batch, a, b)
        name: Solver = "proximal" if solver == "auto" else solver
        unit, _ = of_unit_size(problem.cost)
        plan, potentials = _iterated(replace(problem, cost=unit), name, epsilon, beta, iterations)
        gap = duality_gap(unit, plan, potentials)
        if problem.finite is not None:
            gap = torch.where(problem.finite.flatten(), gap, torch.inf)
        return problem.finished(plan).reshape(cost.shape), gap.reshape(cost.shape[:-2])


def default_solver(device: torch.device, nodes: int) -> Solver:
    """Return the solver that "auto" stands for on a device, for problems of so many nodes on the larger side.

    Where Triton does not run, the loop of "proximal" takes a thousand launches. Small problems are sooner solved by the
    CPU, though the device has to wait for it; so not where its work is recorded as a CUDA graph.
    """
    if device.type == "cpu":
        return "exact"
    if device.type == "cuda" and (not fused_solver.given_up or torch.cuda.is_current_stream_capturing()):
        return "proximal"
    return "exact" if nodes <= HOST_UP_TO and not compiled_assignment.given_up else "proximal"


def emd(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, solver: Solver = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the transport cost ``(plan * cost).sum()`` of each problem, and the plan.

    Args:
        cost, a, b, solver, **options: see :func:`solve`. The gradient of the value with respect to `cost` is the plan
            (envelope theorem); none flows to the masses.

    Returns:
        The values, shape (B,), or () for a single problem, and the plans, as of :func:`solve`.

    Example:
        >>> value, plan = emd(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> float(value)
        0.0
    """
    plan = solve(cost, a, b, solver, **options)
    return (plan * cost).sum(dim=(-2, -1)), plan


def _checked(cost: Tensor, solver: Solver, epsilon: float, beta: float | None, iterations: int) -> Tensor:
    """Check all arguments but the masses; return the costs as a batch without graph."""
    check_choice("solver", solver, Solver)
    check_number("epsilon", epsilon, 1e-6)
    if beta is not None:
        check_number("beta", beta, 0.1)
    check_number("iterations", iterations, 1, whole=True)
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        got = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
        raise TypeError(f"cost must be a floating-point tensor; got {got}")
    if cost.ndim not in (2, 3) or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must have shape (B, N, M) or (N, M), N and M >= 1; got {tuple(cost.shape)}")
    return cost.detach() if cost.ndim == 3 else cost.detach()[None]


def _plan(
    cost: Tensor, a: Tensor | None, b: Tensor | None, solver: str, epsilon: float, beta: float | None, iterations: int
) -> Tensor:
    """Return the plans of a batch (B, N, M) whose arguments are checked, apart from the masses."""
    if solver == "auto":
        solver = default_solver(cost.device, max(cost.shape[1:]))
    if solver == "exact" and a is None and b is None and _is_whole(cost):
        plan = whole_plan(cost)
        if plan is not None:
            return plan
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        if solver == "proximal" and _fits_fused(cost):
            plan = _try_fused(cost, a, b, beta, iterations)
            if plan is not None:
                return plan
        problem = Problem.of(cost, a, b)
        if solver == "exact":
            plan = exact_plan(problem.cost, problem.rows, problem.columns, uniform=problem.uniform)
        else:
            plan, _ = _iterated(problem, solver, epsilon, beta, iterations)
        return problem.finished(plan)


def _is_whole(cost: Tensor) -> bool:
    """Whether uniform masses of the larger side need not be split, and float32 is enough to find their plan."""
    n, m = cost.shape[1:]
    return (n % m == 0 or m % n == 0) and cost.dtype != torch.float64


def _fits_fused(cost: Tensor) -> bool:
    """Whether the Triton kernel can take these problems: small ones, in the memory of an NVIDIA or AMD device."""
    small = max(cost.shape[1:]) <= FUSED_UP_TO
    return not fused_solver.given_up and type(cost) is Tensor and cost.is_cuda and small and cost.dtype != torch.float64


def _try_fused(cost: Tensor, a: Tensor | None, b: Tensor | None, beta: float | None, iterations: int) -> Tensor | None:
    """Return the plans of the Triton kernel, or None if it cannot be compiled or started here."""
    rows = None if a is None else masses_of("a", a, cost.float(), cost.shape[1])
    columns = None if b is None else masses_of("b", b, cost.float(), cost.shape[2])
    beta = beta or default_beta(*cost.shape[1:], uniform=a is None and b is None)
    return fused_solver(cost, rows, columns, beta=beta, iterations=iterations)


# One opaque operation for torch.compile, which cannot look into compiled solvers of other libraries.
_compiled_plan = torch.library.custom_op("sfr::transport_plan", _plan, mutates_args=())


@_compiled_plan.register_fake
def _(cost: Tensor, *_: Any) -> Tensor:
    return cost.new_empty(cost.shape, dtype=plan_dtype(cost))


def _iterated(
    problem: Problem, solver: str, epsilon: float, beta: float | None, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return plans, (B, N, M), and potentials of the columns, (B, M)."""
    cost, rows, columns = problem.cost, problem.rows, problem.columns
    if solver == "proximal":
        beta = beta or default_beta(*cost.shape[1:], uniform=problem.uniform)
        return proximal_plan(cost, rows, columns, beta=beta, iterations=iterations)
    return sinkhorn_plan(cost, rows, columns, epsilon=epsilon, iterations=iterations)
