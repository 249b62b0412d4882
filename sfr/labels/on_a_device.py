"""Which label terms and gates the Triton kernels take, and that they are used where they work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sfr.labels.class_means import ALL_ROWS_UP_TO, ClassMeans
from sfr.labels.past_predictions import PastPredictions
from sfr.transport.fallback import OptionalSolver


def _load() -> Callable[..., Tensor]:
    from sfr.labels import fused

    return lambda name, *arguments: getattr(fused, name)(*arguments)


label_kernels = OptionalSolver(
    "triton", _load, "the kernels of the label term do not run here, so PyTorch's operations take their place"
)


Source: TypeAlias = ClassMeans | PastPredictions


class LabelStep(NamedTuple):
    """What the labels of one training step ask of its logits (B, K).

    Args:
        target: class indices, (B, ...), or soft targets; the kernels take class indices (B,).
        source: where the distributions come from that targets are smoothed towards, or None for the uniform one.
        numbers: of the samples in the training set, shape (B,), for past predictions.
        alpha: share of the distributions in the targets.
        early_learning: weight of :func:`sfr.labels.early_learning.agreed`, for past predictions.
        ignore_index: class index of labels to be left out.
    """

    target: Tensor
    source: Source | None
    numbers: Tensor | None
    alpha: float
    early_learning: float
    ignore_index: int


def loss_on_a_device(logits: Tensor, step: LabelStep) -> Tensor | None:
    """Return :func:`sfr.labels.fused.fused_loss`, or None where the kernels do not take or do not run such a step."""
    if not _fit(logits, step.target) or not _serves(step.source, logits.shape[1]):
        return None
    if step.source is not None:
        step.source.prepare(logits.new_empty((0, logits.shape[1]), dtype=torch.float32))
    return label_kernels("fused_loss", logits, step)


def fitted_on_a_device(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """Return :func:`sfr.labels.fused.fused_fitted`, or None where the kernels do not take or do not run it."""
    return label_kernels("fused_fitted", logits, target, ignore_index) if _fit(logits, target) else None


def _fit(logits: Tensor, target: Tensor) -> bool:
    """Whether these are on an NVIDIA or AMD device, logits (B, K) of at most float32 and class indices (B,)."""
    return (
        not label_kernels.given_up
        and logits.is_cuda
        and type(logits) is Tensor
        and type(target) is Tensor
        and target.device == logits.device
        and logits.ndim == 2
        and logits.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and len(logits) > 0
        and logits.shape[1] * abs(logits.stride(1)) < 2**31
        and not target.is_floating_point()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # of torch.func, whose tensors hide their values
    )


def _serves(source: Source | None, classes: int) -> bool:
    """Whether the kernels ask this source: its rows all move, and ranks exchange no samples of which they differ."""
    if isinstance(source, ClassMeans):
        return classes <= ALL_ROWS_UP_TO
    return source is None or not (source.sync and dist.is_available() and dist.is_initialized())
