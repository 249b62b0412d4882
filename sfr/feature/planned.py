"""The squared cost between two sets of nodes, and their distance under a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_cost(shallow: Tensor, deep: Tensor) -> Tensor:
    """Mean over channels of the squared difference, (B, N, M), without a (B, N, M, C) tensor."""
    # The distance does not change when both sets move; around their common mean the products cancel least.
    centre = (shallow.mean(dim=1, keepdim=True) + deep.mean(dim=1, keepdim=True)) / 2
    shallow, deep = shallow - centre, deep - centre
    width = shallow.shape[2]
    cost = torch.bmm(shallow, deep.transpose(1, 2)).mul_(-2.0 / width)
    cost += shallow.square().sum(dim=2).div_(width)[:, :, None]
    cost += deep.square().sum(dim=2).div_(width)[:, None, :]
    return cost.clamp_min_(0.0)


class PlannedDistance(torch.autograd.Function):
    """Squared distance under a plan, whose backward keeps the nodes and the plan, and no cost matrix."""

    @staticmethod
    def forward(ctx: Any, shallow: Tensor, deep: Tensor, cost: Tensor, plan: Tensor, uniform: bool) -> Tensor:
        ctx.save_for_backward(shallow, deep, plan)
        ctx.uniform = uniform
        return (cost * plan).sum(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the envelope gradient, dL/ds_p = (2/C) sum_q X_pq (s_p - d_q), and likewise for d."""
        shallow, deep, plan = ctx.saved_tensors
        scale = (2.0 / shallow.shape[2]) * gradient[:, None, None]

        def side(own: Tensor, plan: Tensor, other: Tensor) -> Tensor:
            if ctx.uniform:
                return torch.baddbmm(own, plan, other, beta=1 / own.shape[1], alpha=-1).mul_(scale)
            return (plan.sum(dim=2)[:, :, None] * own).sub_(plan @ other).mul_(scale)

        with torch.autocast(shallow.device.type, enabled=False):
            to_shallow = side(shallow, plan, deep)
            to_deep = side(deep, plan.transpose(1, 2), shallow) if ctx.needs_input_grad[1] else None
        return to_shallow, to_deep, None, None, None
