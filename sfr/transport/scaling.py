"""What the iterative solvers share: costs of one scale at the start, plans of the right marginals at the end."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # smallest mass or scale divided by: float32's own smallest normal number leaves no room for the quotient


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


def standardised(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Centre costs (B, N, M) by rows and columns, which moves no plan, and bring them to standard deviation one."""
    cost = cost / cost.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cost.dtype).tiny)
    cost = cost - (cost * columns[:, None, :]).sum(dim=2, keepdim=True)
    cost = cost - (cost * rows[:, :, None]).sum(dim=1, keepdim=True)
    variance = (cost.square() * rows[:, :, None] * columns[:, None, :]).sum(dim=(1, 2), keepdim=True)
    # Concentrated masses can leave the weighted deviation near zero while the cost is not.
    return cost / torch.maximum(variance.sqrt(), 1e-3 * cost.abs().amax(dim=(1, 2), keepdim=True)).clamp_min(1e-6)
