"""Shared by the iterative solvers: standardised costs at the start, plans with the right marginals at the end."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # smallest divisor; dividing by float32's smallest normal number would overflow


def round_to_marginals(plan: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move a nearly feasible plan onto its marginals (Altschuler, Weed & Rigollet 2017, algorithm 2).

    Args:
        plan: non-negative couplings, shape (B, N, M).
        rows: the row sums wanted, shape (B, N).
        columns: the column sums wanted, shape (B, M), of the same total.

    Returns:
        Plans of shape (B, N, M) with these marginals, to rounding.
    """
    plan = plan * (rows / plan.sum(dim=2).clamp_min(TINY)).clamp_max(1.0)[:, :, None]
    plan = plan * (columns / plan.sum(dim=1).clamp_min(TINY)).clamp_max(1.0)[:, None, :]
    missing_rows = (rows - plan.sum(dim=2)).clamp_min(0.0)
    missing_columns = (columns - plan.sum(dim=1)).clamp_min(0.0)
    share = missing_columns / missing_columns.sum(dim=1, keepdim=True).clamp_min(TINY)
    return plan + missing_rows[:, :, None] * share[:, None, :]


def of_unit_size(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Divide costs (B, N, M), of any size down to the smallest numbers, by the largest of each problem, (B, 1, 1)."""
    largest = cost.abs().amax(dim=(1, 2), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return cost / largest, largest


def standardised(cost: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre costs (B, N, M) by rows and columns, which moves no plan, and bring them to standard deviation one.

    Returns:
        The standardised cost; and the scale (B, 1, 1) and the offsets of the columns (B, 1, M) that lead back:
        ``cost = scale * standardised + offsets``, but for a constant in each row.
    """
    cost, largest = of_unit_size(cost)
    cost = cost - (cost * columns[:, None, :]).sum(dim=2, keepdim=True)
    offsets = (cost * rows[:, :, None]).sum(dim=1, keepdim=True)
    cost = cost - offsets
    variance = (cost.square() * rows[:, :, None] * columns[:, None, :]).sum(dim=(1, 2), keepdim=True)
    # Concentrated masses can leave the weighted deviation near zero while the cost is not.
    deviation = torch.maximum(variance.sqrt(), 1e-3 * cost.abs().amax(dim=(1, 2), keepdim=True)).clamp_min(1e-6)
    return cost / deviation, deviation * largest, offsets * largest


def duality_gap(cost: Tensor, plan: Tensor, potentials: Tensor) -> Tensor:
    """Return an upper bound of how far plans are above the optimum, relative to their own cost, shape (B,).

    Any column potentials lead to a feasible dual, whose value bounds the optimum from below: take the best row
    potentials for them, then the best column potentials for those (the c-transform, twice). A bound of the rounding
    error is added.

    Args:
        cost: costs of unit size, see :func:`of_unit_size`, shape (B, N, M).
        plan: feasible plans, shape (B, N, M).
        potentials: of the columns, shape (B, M), in the units of the cost; any numbers.

    Reference:
        Peyré & Cuturi, Computational Optimal Transport, 2019, chapter 5.
    """
    value = (plan * cost).sum(dim=(1, 2)).abs()
    # Optimal potentials lie no further apart than twice the range of the cost; others would only cancel its digits.
    potentials = potentials.nan_to_num(0.0)
    potentials = (potentials - potentials.amax(dim=1, keepdim=True)).clamp_min(-4.0)
    of_rows = (cost - potentials[:, None, :]).amin(dim=2, keepdim=True)
    above = cost - of_rows
    of_columns = above.amin(dim=1, keepdim=True)
    # The plan's mass on the slack, all >= 0, is the difference of primal and dual, without their cancellation.
    excess = (plan * (above - of_columns)).sum(dim=(1, 2))
    finfo = torch.finfo(cost.dtype)
    rounding = 2 * finfo.eps * (plan * (cost.abs() + of_rows.abs() + of_columns.abs())).sum(dim=(1, 2))
    return (excess + rounding) / value.clamp_min(finfo.tiny)
