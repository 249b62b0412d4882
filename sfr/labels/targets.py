"""Targets: checked as they come, and smoothed towards distributions over the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from sfr.checks import check_floating, check_number
from sfr.config import IGNORE_INDEX

# Soft targets of half precision do not sum to 1 exactly; those of several labels an image are off by 1 or more.
SUM_TOLERANCE = 0.01
OTHER_LOSSES = (
    "For a regression or a single yes or no pass its loss, as in SFRLoss(model, label_loss=nn.MSELoss()) or "
    "label_loss=nn.BCEWithLogitsLoss()"
)
ONE_HOT = "If it is one-hot, pass target.argmax(dim=1), or target.float() as soft targets"
INDICES = "If these are class indices, pass target.long()"
ORDER = "The order is criterion(output, target)"
ONE_COLUMN = "Pass target.squeeze(1)"
CLASSES_LAST = "Axis 1 of the logits is the classes; if yours are last, pass logits.movedim(-1, 1)"
ONE_EACH = "Give one label for each prediction"
SEVERAL_LABELS = (
    "For several labels an image pass another loss, as in SFRLoss(model, label_loss=nn.BCEWithLogitsLoss())"
)


def smooth_labels(target: Tensor, distributions: Tensor, alpha: float) -> Tensor:
    """Return the smoothed target distributions ``(1 - alpha) * onehot(y) + alpha * S[y]``.

    Args:
        target: class indices, shape (N,), or soft targets, shape (N, K); soft targets take the one-hot's place and
            mix the rows of S in the same proportions.
        distributions: S, one distribution per class, shape (K, K), floating.
        alpha: share of S in the target, in [0, 1].

    Returns:
        Distributions of shape (N, K), in the dtype of `distributions`.

    Raises:
        TypeError, ValueError: naming the argument that is of the wrong kind, shape or range; the values of a target are
            checked on the CPU only.

    Reference:
        Zhang et al., Delving Deep into Label Smoothing, arXiv 2011.12562, with ``1 - alpha`` where they write alpha.

    Example:
        >>> smooth_labels(torch.tensor([1]), torch.full((2, 2), 0.5), alpha=0.2)
        tensor([[0.1000, 0.9000]])
    """
    check_number("alpha", alpha, 0, 1)
    check_floating("distributions", distributions)
    if distributions.ndim != 2 or distributions.shape[0] != distributions.shape[1]:
        raise ValueError(
            f"distributions must have shape (K, K), a row for each class; got {tuple(distributions.shape)}"
        )
    _check_distributions(distributions, wait=False, of="distributions: the rows", hint="")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    classes = len(distributions)
    if target.is_floating_point():
        if target.ndim != 2 or target.shape[1] != classes:
            raise ValueError(f"target: soft targets must have shape (N, {classes}); got {tuple(target.shape)}")
        _check_distributions(target, wait=False)
    else:
        if target.ndim != 1 or target.dtype == torch.bool:
            raise ValueError(f"target: class indices must have shape (N,); got {target.dtype} {tuple(target.shape)}")
        _check_range(target.long(), classes, None)
    return smoothed(target, rows_of(target, distributions), alpha)


def rows_of(target: Tensor, distributions: Tensor) -> Tensor:
    """Return S[y], (N, K): the rows of the classes, or their mixtures by soft targets."""
    return (
        target.to(distributions.dtype) @ distributions if target.is_floating_point() else distributions[target.long()]
    )


def smoothed(target: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) * onehot(y) + alpha * rows, (N, K)."""
    if target.is_floating_point():
        return (1 - alpha) * target.to(rows.dtype) + alpha * rows
    towards = alpha * rows
    towards[torch.arange(len(target), device=target.device), target.long()] += 1 - alpha
    return towards


def checked_target(logits: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX, *, wait: bool = False) -> Tensor:
    """Return the target as ``F.cross_entropy`` takes it, or raise an error that says what does not fit.

    Values are looked at on the CPU, and the sums of soft targets elsewhere, too, if the host may `wait` for them.
    """
    check_logits(logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    if logits.shape[1] == 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have one class, whose cross-entropy is always 0. {OTHER_LOSSES}"
        )
    expected = (logits.shape[0], *logits.shape[2:])
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target: soft targets must have the shape of the logits, {tuple(logits.shape)}; "
                f"got {tuple(target.shape)}{f'. {INDICES}' if target.shape == expected else ''}"
            )
        _check_distributions(target, wait)
        return target
    if target.shape != expected:
        raise ValueError(
            f"target: class indices must have shape {expected} for logits of shape {tuple(logits.shape)}; got "
            f"{tuple(target.shape)}. {_what_to_pass(logits.shape, target.shape)}"
        )
    target = target.long()
    _check_range(target, logits.shape[1], ignore_index)
    return target


def _what_to_pass(logits: torch.Size, target: torch.Size) -> str:
    """Return what to do about class indices whose shape does not fit."""
    if target == logits:
        return ONE_HOT
    if target == (logits[0], 1, *logits[2:]):
        return ONE_COLUMN
    return CLASSES_LAST if len(logits) > 2 and target == logits[:-1] else ONE_EACH


def check_logits(logits: object) -> None:
    """Raise unless these can be logits."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor; got {type(logits).__name__}")
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            "logits must be floating, of shape (B, K) or (B, K, ...) with the classes on axis 1; "
            f"got {logits.dtype} {tuple(logits.shape)}. {OTHER_LOSSES if logits.is_floating_point() else ORDER}"
        )


def _check_distributions(
    target: Tensor, wait: bool, of: str = "target: the rows of soft targets", hint: str = f". {SEVERAL_LABELS}"
) -> None:
    """Raise unless soft targets, with the classes on axis 1, are distributions."""
    if target.device.type != "cpu" and not wait:
        return
    sums = target.detach().sum(dim=1, dtype=torch.promote_types(target.dtype, torch.float32))
    wrong = sums[~((sums - 1).abs() <= SUM_TOLERANCE)]
    if len(wrong):
        raise ValueError(f"{of} must sum to 1 over the classes, on axis 1; got a sum of {wrong[0].item():g}{hint}")
    if target.numel() and target.detach().amin() < -SUM_TOLERANCE:
        raise ValueError(f"{of} must not be negative; got {target.detach().amin().item():g}")


def _check_range(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise unless class indices are in range; checked on the CPU only, to avoid a device sync."""
    if target.device.type != "cpu" or not target.numel():
        return
    least, largest = map(int, target.aminmax())  # one operation, which is enough for labels that are in range
    if least >= 0 and largest < classes:
        return
    outside = (target < 0) | (target >= classes)
    wrong = target[outside if ignore_index is None else outside & (target != ignore_index)]
    if len(wrong):
        ignored = "" if ignore_index is None else f" or be ignore_index={ignore_index}"
        raise ValueError(
            f"target: class indices must lie in [0, {classes - 1}]{ignored}; "
            f"got values from {wrong.min().item()} to {wrong.max().item()}"
        )
