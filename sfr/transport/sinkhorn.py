"""Entropic plans on any device: batched log-domain Sinkhorn with annealing, rounded onto the marginals."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # smallest mass or scale divided by: float32's own smallest normal number leaves no room for the quotient


def sinkhorn_plan(cost: Tensor, rows: Tensor, columns: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return feasible, nearly optimal plans of a batch of problems without waiting for the device.

    Sinkhorn's alternating updates of the two potentials (Cuturi 2013) in the log domain. The regularization starts at
    the scale of the cost and falls geometrically to `epsilon` of it over the first half of the iterations (annealing,
    Schmitzer 2019), then stays. The number of iterations is fixed: a test of convergence would make the host wait.

    Args:
        cost: finite costs, shape (B, N, M), on any device.
        rows: masses, shape (B, N), each row of sum 1.
        columns: masses, shape (B, M), each row of sum 1.
        epsilon: final regularization, relative to the standard deviation of the doubly centred cost.
        iterations: number of updates of both potentials.

    Returns:
        Plans of shape (B, N, M) with the dtype and device of `cost`.
    """
    cost = _standardised(cost, rows, columns)
    log_rows, log_columns = rows.clamp_min(TINY).log(), columns.clamp_min(TINY).log()
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    blur = epsilon
    for step in range(iterations):
        blur = max(epsilon, epsilon ** min(1.0, 2 * step / iterations))
        f = -blur * ((g[:, None, :] - cost) / blur + log_columns[:, None, :]).logsumexp(dim=2)
        g = -blur * ((f[:, :, None] - cost) / blur + log_rows[:, :, None]).logsumexp(dim=1)
    log_plan = (f[:, :, None] + g[:, None, :] - cost) / blur
    plan = (log_plan + log_rows[:, :, None] + log_columns[:, None, :]).exp()
    return round_to_marginals(plan, rows, columns)


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


def _standardised(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Centre the cost by rows and columns, which moves no plan, and bring it to standard deviation one."""
    cost = cost / cost.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cost.dtype).tiny)
    cost = cost - (cost * columns[:, None, :]).sum(dim=2, keepdim=True)
    cost = cost - (cost * rows[:, :, None]).sum(dim=1, keepdim=True)
    variance = (cost.square() * rows[:, :, None] * columns[:, None, :]).sum(dim=(1, 2), keepdim=True)
    # Concentrated masses can leave the weighted deviation near zero while the cost is not.
    return cost / torch.maximum(variance.sqrt(), 1e-3 * cost.abs().amax(dim=(1, 2), keepdim=True)).clamp_min(1e-6)
