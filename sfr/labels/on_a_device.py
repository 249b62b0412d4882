"""Which label terms the Triton kernels take, and that they are used where they work."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sfr.labels.class_means import ALL_ROWS_UP_TO, ClassMeans
from sfr.labels.past_predictions import PastPredictions
from sfr.transport.fallback import OptionalSolver


def _load_fused() -> Callable[..., Tensor]:
    from sfr.labels.fused import fused_loss

    return fused_loss


fused_loss = OptionalSolver(
    "triton", _load_fused, "the fused label term does not run here, so PyTorch's operations take its place"
)


def loss_on_a_device(
    logits: Tensor,
    target: Tensor,
    source: ClassMeans | PastPredictions | None,
    numbers: Tensor | None,
    alpha: float,
    ignore_index: int,
) -> Tensor | None:
    """Return :func:`sfr.labels.fused.fused_loss`, or None where the kernels do not take or do not run such a step."""
    if fused_loss.given_up or not _fits(logits, target, source):
        return None
    return fused_loss(logits, target, source, numbers, alpha, ignore_index)


def _fits(logits: Tensor, target: Tensor, source: ClassMeans | PastPredictions | None) -> bool:
    if (
        not logits.is_cuda
        or type(logits) is not Tensor
        or logits.ndim != 2
        or logits.dtype not in (torch.float16, torch.bfloat16, torch.float32)
        or not len(logits)
        or target.is_floating_point()
        or torch.compiler.is_compiling()
    ):
        return False
    if isinstance(source, ClassMeans):  # of which all rows move
        return logits.shape[1] <= ALL_ROWS_UP_TO
    # Ranks exchange what they said of their samples, of which each may have another number.
    alone = not (dist.is_available() and dist.is_initialized())
    return source is None or alone or not source.sync
