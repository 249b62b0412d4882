"""GatherRows: the rows of a tensor from all ranks, with the gradient of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GatherRows(torch.autograd.Function):
    """The rows of all ranks, one rank's below the other's.

    Every rank goes on to compute the same loss of all rows, so each knows the gradient of its own ones without asking
    the others. It is multiplied by the number of ranks because DDP will divide the sum over the ranks by that number.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        return ranks * gradient.chunk(ranks)[dist.get_rank()]
