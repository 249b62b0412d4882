"""The label term and the gate of class indices on a GPU, in few launches, whatever targets are smoothed towards."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sfr.labels import kernels
from sfr.labels.class_means import ClassMeans
from sfr.labels.early_learning import slope_of_agreed
from sfr.labels.kernels import (
    class_sums_kernel,
    early_kernel,
    fitted_kernel,
    keep_kernel,
    loss_kernel,
    move_kernel,
)
from sfr.labels.on_a_device import LabelStep
from sfr.labels.past_predictions import PastPredictions
from sfr.transport.fused import OPTIONS

LONGEST_BLOCK = 4096  # classes that a program takes at a time


def fused_loss(logits: Tensor, step: LabelStep) -> Tensor:
    """Return the loss of :class:`sfr.DynamicLabelSmoothing` in a training step, 0-d float32, and tell the source of it.

    Args:
        logits: shape (B, K), of at most float32.
        step: its source is prepared for such logits. Class means are of few enough classes that all rows move at once,
            and past predictions none that another rank waits for.
    """
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever it is given
        return _FusedLoss.apply(logits, step)


def fused_fitted(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return :func:`sfr.labels.fitted.fitted`, (B,) float32, of logits (B, K) and class indices (B,)."""
    rows, classes = logits.shape
    found = logits.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        fitted_kernel[(rows,)](
            logits,
            *logits.stride(),
            target.contiguous(),
            found,
            classes,
            ignore_index,
            BLOCK=_block(classes),
            **OPTIONS,
        )
    return found


def _block(classes: int) -> int:
    """Return how many classes a program takes at a time."""
    return min(LONGEST_BLOCK, _every(classes))


def _every(classes: int) -> int:
    """Return the size of a block that holds all classes."""
    return max(16, triton.next_power_of_2(classes))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, step: LabelStep) -> Tensor:
        (rows, classes), target, source = logits.shape, step.target.contiguous(), step.source
        gradient = logits.new_empty((rows, classes), dtype=torch.float32)
        losses, sides, means = gradient.new_empty(rows), gradient.new_empty((3, rows)), None
        correct = gradient.new_empty(rows, dtype=torch.int32)
        count = (target != step.ignore_index).sum()
        block = _block(classes)
        kind, towards, numbers, samples = kernels.UNIFORM, gradient, target, 0
        if isinstance(source, ClassMeans):
            kind, towards = kernels.CLASS_MEANS, source.distributions
        elif isinstance(source, PastPredictions):
            assert step.numbers is not None
            kind, towards, samples = kernels.PAST, source.table, source.num_samples
            numbers = step.numbers.to(logits.device).contiguous()
        loss_kernel[(rows,)](
            logits, *logits.stride(), target, numbers, towards, count, losses, gradient,
            sides, correct, rows, classes, samples, float(step.alpha), 1.0 - step.alpha, step.ignore_index,
            SOURCE=kind.value, BLOCK=block, **OPTIONS,
        )  # fmt: skip
        if isinstance(source, PastPredictions):
            keep_kernel[(rows,)](
                logits, *logits.stride(), numbers, sides, source.table, rows, classes, samples, float(source.momentum),
                BLOCK=block, **OPTIONS,
            )  # fmt: skip
            if step.early_learning:
                means = torch.empty_like(gradient)
                early_kernel[(rows,)](
                    logits, *logits.stride(), target, numbers, sides, source.table, means, count, losses,
                    gradient, classes, samples, float(step.early_learning), step.ignore_index, BLOCK=block, **OPTIONS,
                )  # fmt: skip
        elif source is not None:
            sums = gradient.new_empty((classes, classes + 1))
            class_sums_kernel[(classes,)](
                logits, *logits.stride(), correct, sides, sums, rows, classes, BLOCK=_every(classes), **OPTIONS
            )
            _move(source, sums)
        ctx.save_for_backward(logits, gradient, sides[2], means, target, count)
        ctx.step = step
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None]:
        logits, gradient, sums, means, target, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            softmax = F.softmax(logits, dim=1, dtype=torch.float32)
            varying = sums[:, None] * softmax
            if means is not None:
                share = torch.where(target != ctx.step.ignore_index, ctx.step.early_learning / count, 0.0)
                varying = varying + share[:, None] * slope_of_agreed(means, softmax)
            result = (of_loss * (gradient + (varying - varying.detach()))).to(logits.dtype)
        else:
            result = torch.mul(gradient, of_loss, out=torch.empty_like(gradient, dtype=logits.dtype))
        return result, None


def _move(means: ClassMeans, sums: Tensor) -> None:
    """Let the class means take in the sums (K, K) of a step and, in the last column, the number of its samples."""
    means.sum_over_ranks(sums)
    if means.update == "epoch":
        means.sums += sums[:, :-1]
        means.counts += sums[:, -1]
        return
    log_rest = math.log1p(-means.momentum) if means.momentum < 1 else -math.inf
    move_kernel[(len(sums),)](
        sums, means.distributions, means.counts, len(sums), log_rest, BLOCK=_every(len(sums)), **OPTIONS
    )
