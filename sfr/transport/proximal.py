"""Nearly exact plans on any device: the batched proximal point method, rounded onto the marginals."""

from __future__ import annotations

import torch
from torch import Tensor

from sfr.transport.scaling import TINY, round_to_marginals, standardised

ITERATIONS = 100  # unless another number is asked for


def default_beta(n: int, m: int, *, uniform: bool) -> float:
    """Return the step size for N rows and M columns that suits most costs."""
    return 1.0 if uniform and n == m else 2.0


def proximal_plan(
    cost: Tensor, rows: Tensor, columns: Tensor, *, beta: float, iterations: int
) -> tuple[Tensor, Tensor]:
    r"""Return feasible, nearly optimal plans of a batch of problems without waiting for the device.

    Each iteration is one Sinkhorn step on the kernel :math:`G = e^{-C / \beta}` times the plan so far, so the plan
    converges to the exact one; plain Sinkhorn converges to a blurred one. The loop has no exponential or logarithm. The
    number of iterations is fixed, because a convergence test would make the host wait for the device.

    Args:
        cost: finite costs, shape (B, N, M), on any device.
        rows: masses, shape (B, N), each row of sum 1.
        columns: masses, shape (B, M), each row of sum 1.
        beta: step size, relative to the standard deviation of the doubly centred cost; below 0.5 float32 underflows.
        iterations: number of proximal steps.

    Returns:
        Plans of shape (B, N, M), and the potentials of the columns, (B, M), in the units of the cost, both with the
        dtype and device of `cost`.

    Reference:
        Xie et al., A Fast Proximal Point Method for Computing Exact Wasserstein Distance (IPOT), UAI 2019.
    """
    cost, scale, offsets = standardised(cost, rows, columns)
    # From zero upwards in each row and column: no entry of the kernel overflows, and none vanishes with its whole row.
    cost = cost - cost.amin(dim=2, keepdim=True)
    lowest = cost.amin(dim=1, keepdim=True)
    kernel = torch.exp((lowest - cost) / beta)
    plan = torch.ones_like(kernel)
    column_scale = columns[:, None, :]
    for _ in range(iterations):
        # Smaller entries no longer count; a CPU is a hundred times slower on those below its smallest normal number.
        plan.mul_(kernel).clamp_min_(TINY)
        # The column scaling of the previous step is a good first guess; without it the method is much slower.
        row_scale = rows[:, :, None] / (plan * column_scale).sum(dim=2, keepdim=True).clamp_min(TINY)
        plan.mul_(row_scale)
        column_scale = columns[:, None, :] / plan.sum(dim=1, keepdim=True).clamp_min(TINY)
        plan.mul_(column_scale)
    # Where the iteration stands still, row_scale * kernel * column_scale is 1 on the plan and less elsewhere: beta
    # times the logarithms of the scales are optimal potentials.
    potentials = scale * (beta * column_scale.clamp_min(TINY).log() + lowest) + offsets
    return round_to_marginals(plan, rows, columns), potentials[:, 0, :]
