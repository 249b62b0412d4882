"""Cost of the label term and of the feature term, in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sfr
from benchmarks.scaling.network import CPU, SURE, Row, milliseconds, wrapped
from sfr.preflight.cost import compare_steps


def label_cost(classes: int, repeats: int) -> Row:
    """Cost of the label term on 128 logits, against cross-entropy."""
    target = torch.randint(classes, (128,))
    row = against_cross_entropy(torch.randn(128, classes), target, repeats)
    return {"classes": classes, **row, "statistics MiB": round(classes**2 * 4 / 2**20, 2)}


def pixel_cost(classes: int, size: int, repeats: int) -> Row:
    """Cost of the label term on the logits of four segmented images, against cross-entropy."""
    target = torch.randint(classes, (4, size, size))
    logits = torch.randn(4, classes, size, size)
    row = against_cross_entropy(logits, target, repeats, spread=lambda hot: hot.movedim(-1, 1))
    return {"classes": classes, "image": f"{size} x {size}", **row, "logits MiB": round(logits.nbytes / 2**20, 1)}


def against_cross_entropy(
    logits: Tensor, target: Tensor, repeats: int, spread: Callable[[Tensor], Tensor] = lambda hot: hot
) -> Row:
    """Return time and peak memory of loss and gradient."""
    logits = (logits + SURE * spread(F.one_hot(target, logits.shape[1]))).requires_grad_()
    criterion = sfr.DynamicLabelSmoothing()
    costs = compare_steps(
        {
            "plain": lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
            "sfr": lambda: torch.autograd.grad(criterion(logits, target), logits),
        },
        CPU,
        repeats,
    )
    return {
        "cross-entropy ms": milliseconds(costs["plain"]),
        "SFR ms": milliseconds(costs["sfr"]),
        "cross-entropy MiB": round(costs["plain"].peak_bytes / 2**20, 2),
        "SFR MiB": round(costs["sfr"].peak_bytes / 2**20, 2),
    }


def feature_cost(batch: int, grid: int, repeats: int) -> Row:
    """Cost of the feature term alone, as the difference of two steps that are otherwise the same."""
    images, target = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    model = wrapped(10)
    criterion = sfr.SFRLoss(model, max_grid=grid)

    def plain() -> None:
        with model.disable():
            criterion(model(images), target).backward()

    costs = compare_steps({"plain": plain, "sfr": lambda: criterion(model(images), target).backward()}, CPU, repeats)
    added = milliseconds(costs["sfr"]) - milliseconds(costs["plain"])
    return {
        "batch": batch,
        "nodes of a map": grid**2,
        "feature term ms": round(added, 1),
        "ms an image": round(added / batch, 2),
        "MiB": round((costs["sfr"].peak_bytes - costs["plain"].peak_bytes) / 2**20, 1),
    }
