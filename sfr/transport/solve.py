"""solve(): one entry for every solver; it checks, normalises and dispatches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfr.config import Solver, check_choice, check_number
from sfr.transport.exact import exact_plan
from sfr.transport.proximal import proximal_plan
from sfr.transport.sinkhorn import sinkhorn_plan


def solve(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    solver: Solver = "auto",
    *,
    epsilon: float = 0.02,
    beta: float | None = None,
    iterations: int = 100,
) -> Tensor:
    r"""Solve a batch of optimal transport problems and return a plan with exactly the given marginals.

    .. math:: X^* = \arg\min_X \sum_{pq} X_{pq} C_{pq} \quad\text{s.t.}\quad X 1 = a,\; X^T 1 = b,\; X \ge 0

    The plan is a constant: no gradient flows through the solver. By the envelope theorem the gradient of
    ``(plan * cost).sum()`` through `cost` alone is the exact gradient of the transport cost.

    POT's ``ot.solve_batch`` gives entropic plans (without ``reg`` it returns the independent coupling, as of 0.9.7: its
    issue 842), takes an absolute regularization (one value for problems of different scale), synchronises with the
    host to test convergence, and misses the marginals if stopped early. Here
    the regularization is relative to each problem's own scale, the loop never waits for the device, every plan is
    rounded onto its marginals, and the exact plan is offered behind the same interface.

    Args:
        cost: ground cost, shape (B, N, M) or (N, M), any floating dtype, any scale, any sign. A problem whose cost is
            not finite gets the independent coupling ``a bᵀ``. "exact" is accurate to about 1e-6 of a problem's
            largest absolute cost, 1e-9 if that is float64.
        a: row masses, shape (B, N) or (N,), >= 0; default uniform ``1/N``.
        b: column masses, shape (B, M) or (M,), >= 0, with the same sum as `a`; default uniform ``1/M``.
        solver: "exact"; "proximal" (0.01 to 0.06 % above the optimum on feature costs at N = 64) or "sinkhorn" (0.1 to
            0.2 %, and several times slower), both on the tensor's own device; "auto": exact for CPU tensors, proximal
            elsewhere.
        epsilon: final regularization of "sinkhorn", relative to the standard deviation of the doubly centred cost.
        beta: step size of "proximal", likewise relative; None means 1 for uniform masses and N = M, else 2.
        iterations: number of iterations of "proximal" and "sinkhorn".

    Returns:
        The plan, shape of `cost`; float64 for a float64 cost, else float32; on the device of `cost`.

    Raises:
        TypeError: if `cost` is no floating tensor.
        ValueError: for wrong shapes, an unknown solver, and (CPU tensors only, to spare a device the wait) for
            negative or non-finite masses or sums of `a` and `b` that differ.

    Reference:
        Peyré & Cuturi, Computational Optimal Transport, 2019. Flamary et al., POT: Python Optimal Transport, 2021.

    Example:
        >>> solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
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
    dtype = cost.dtype if cost.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        batch = cost.detach().to(dtype).reshape(-1, *cost.shape[-2:])
        # One pass where the host may look at the result; a sum that overflows leaves the decision to the second.
        sound = batch.device.type == "cpu" and bool(batch.sum(dim=(1, 2)).isfinite().all())
        finite = None if sound else batch.abs().amax(dim=(1, 2), keepdim=True).isfinite()
        if finite is not None:
            batch = torch.where(finite, batch, 0.0)
        rows = _masses("a", a, batch, batch.shape[1])
        columns = _masses("b", b, batch, batch.shape[2])
        mass = rows.sum(dim=1, keepdim=True)
        _check_equal_mass(mass, columns.sum(dim=1, keepdim=True))
        rows, columns = _normalised(rows), _normalised(columns)
        if solver == "auto":
            solver = default_solver(batch.device)
        uniform = a is None and b is None
        if solver == "exact":
            plan = exact_plan(batch, rows, columns, uniform=uniform)
        elif solver == "proximal":
            if beta is None:
                beta = 1.0 if uniform and batch.shape[1] == batch.shape[2] else 2.0
            plan = proximal_plan(batch, rows, columns, beta=beta, iterations=iterations)
        else:
            plan = sinkhorn_plan(batch, rows, columns, epsilon=epsilon, iterations=iterations)
        if finite is not None:
            plan = torch.where(finite, plan, rows[:, :, None] * columns[:, None, :])
        if a is not None:
            plan = plan * mass[:, :, None]
    return plan.reshape(cost.shape)


def default_solver(device: torch.device) -> Solver:
    """Return the solver that "auto" stands for on a device."""
    return "exact" if device.type == "cpu" else "proximal"


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


def _masses(argument: str, masses: Tensor | None, batch: Tensor, size: int) -> Tensor:
    """Expand the masses of one side to (B, size), checked as far as that costs no wait for the device."""
    count = batch.shape[0]
    if masses is None:
        return batch.new_full((count, size), 1.0 / size)
    if not isinstance(masses, Tensor):
        raise TypeError(f"{argument} must be a tensor; got {type(masses).__name__}")
    if masses.shape not in ((size,), (count, size)):
        raise ValueError(f"{argument} must have shape ({count}, {size}) or ({size},); got {tuple(masses.shape)}")
    masses = masses.detach().to(batch)
    if masses.device.type == "cpu" and not ((masses >= 0) & masses.isfinite()).all():
        raise ValueError(f"{argument} must hold finite masses >= 0; got a minimum of {masses.min().item()}")
    return masses.expand(count, size)


def _check_equal_mass(rows: Tensor, columns: Tensor) -> None:
    """Refuse marginals no plan can have; only on the CPU, where reading the sums costs no wait."""
    if rows.device.type == "cpu":
        # Written so that sums that overflow, whose difference is no number, count as different.
        differs = ~((rows - columns).abs() <= 1e-3 * torch.maximum(rows, columns)).flatten()
        if differs.any():
            problem = int(differs.nonzero()[0])
            raise ValueError(
                f"a and b must have the same, finite sum; in problem {problem} they sum to "
                f"{rows[problem].item():.6g} and {columns[problem].item():.6g}"
            )


def _normalised(masses: Tensor) -> Tensor:
    """Scale each row to sum 1; a row without any mass becomes uniform (its plan is scaled back to zero)."""
    total = masses.sum(dim=1, keepdim=True)
    return torch.where(total > 0, masses / torch.where(total > 0, total, 1.0), 1.0 / masses.shape[1])
