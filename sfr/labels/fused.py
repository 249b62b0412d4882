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
from sfr.labels.kernels import class_sums_kernel, fitted_kernel, keep_kernel, loss_kernel, move_kernel
from sfr.labels.past_predictions import PastPredictions

LONGEST_BLOCK = 4096  # classes that a program takes at a time
OPTIONS = {"enable_fp_fusion": True}  # the same arithmetic with every Triton: 3.9 warns that its default will change


def fused_loss(
    logits: Tensor,
    target: Tensor,
    source: ClassMeans | PastPredictions | None,
    numbers: Tensor | None,
    alpha: float,
    ignore_index: int,
) -> Tensor:
    """Return the loss of :class:`sfr.DynamicLabelSmoothing` in a training step, 0-d float32, and tell the source of it.

    Args:
        logits: shape (B, K), of at most float32.
        target: class indices, shape (B,).
        source: where the distributions come from, prepared for such logits, or None for the uniform one; class means
            of few enough classes that all rows move at once; past predictions that no other rank waits for.
        numbers: of the samples in the training set, shape (B,), for past predictions.
        alpha: share of the distributions in the targets.
        ignore_index: class index of labels to be left out.
    """
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever it is given
        return _FusedLoss.apply(logits, target, source, numbers, alpha, ignore_index)


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
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        source: ClassMeans | PastPredictions | None,
        numbers: Tensor | None,
        alpha: float,
        ignore_index: int,
    ) -> Tensor:
        (rows, classes), target = logits.shape, target.contiguous()
        gradient = logits.new_empty((rows, classes), dtype=torch.float32)
        losses, sides = gradient.new_empty(rows), gradient.new_empty((3, rows))
        correct = gradient.new_empty(rows, dtype=torch.int32)
        count = (target != ignore_index).sum()
        block = _block(classes)
        kind, towards, samples = kernels.UNIFORM, gradient, 0
        if isinstance(source, ClassMeans):
            kind, towards = kernels.CLASS_MEANS, source.distributions
        elif isinstance(source, PastPredictions):
            assert numbers is not None
            kind, towards, samples = kernels.PAST, source.table, source.num_samples
            numbers = numbers.to(logits.device).contiguous()
        loss_kernel[(rows,)](
            logits, *logits.stride(), target, target if numbers is None else numbers, towards, count, losses, gradient,
            sides, correct, rows, classes, samples, float(alpha), 1.0 - alpha, ignore_index, SOURCE=kind.value,
            BLOCK=block, **OPTIONS,
        )  # fmt: skip
        if isinstance(source, PastPredictions):
            keep_kernel[(rows,)](
                logits, *logits.stride(), numbers, sides, source.table, rows, classes, samples, float(source.momentum),
                BLOCK=block, **OPTIONS,
            )  # fmt: skip
        elif source is not None:
            sums = gradient.new_empty((classes, classes + 1))
            class_sums_kernel[(classes,)](
                logits, *logits.stride(), correct, sides, sums, rows, classes, BLOCK=_every(classes), **OPTIONS
            )
            _move(source, sums)
        ctx.save_for_backward(logits, gradient, sides[2])
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, gradient, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            softmax = F.softmax(logits, dim=1, dtype=torch.float32)
            result = (of_loss * (gradient + sums[:, None] * (softmax - softmax.detach()))).to(logits.dtype)
        else:
            result = torch.mul(gradient, of_loss, out=torch.empty_like(gradient, dtype=logits.dtype))
        return (result, *(None,) * 5)


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
