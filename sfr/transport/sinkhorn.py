"""Entropic plans on any device: batched log-domain Sinkhorn with annealing, rounded onto the marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from sfr.transport.scaling import TINY, round_to_marginals, standardised


def sinkhorn_plan(
    cost: Tensor, rows: Tensor, columns: Tensor, *, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor]:
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
        Plans of shape (B, N, M), and the potentials of the columns, (B, M), in the units of the cost, both with the
        dtype and device of `cost`.
    """
    cost, scale, offsets = standardised(cost, rows, columns)
    log_rows, log_columns = rows.clamp_min(TINY).log(), columns.clamp_min(TINY).log()
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    blur = epsilon
    for step in range(iterations):
        blur = max(epsilon, epsilon ** min(1.0, 2 * step / iterations))
        f = -blur * ((g[:, None, :] - cost) / blur + log_columns[:, None, :]).logsumexp(dim=2)
        g = -blur * ((f[:, :, None] - cost) / blur + log_rows[:, :, None]).logsumexp(dim=1)
    log_plan = (f[:, :, None] + g[:, None, :] - cost) / blur
    plan = (log_plan + log_rows[:, :, None] + log_columns[:, None, :]).exp()
    potentials = scale[:, 0, :] * g + offsets[:, 0, :]
    return round_to_marginals(plan, rows, columns), potentials
