"""Cross-entropy towards labels or distributions, finite where classes are impossible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr.labels.targets import smoothed

# Log-probability from which on a class is impossible for the sample: -inf, or what masks by a large number leave, such
# as those of the smallest float, -1e9 or -1e4. No network that trains says so.
IMPOSSIBLE = -1e3


def cross_entropy_towards(
    target: Tensor, rows: Tensor, alpha: float, log_probabilities: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the rows that are `kept` (N,), or of all; NaN if there is none.

    Args:
        target: class indices (N,) or soft targets (N, K).
        rows: the distributions (N, K) that share the target with it, by `alpha`.
        log_probabilities: shape (N, K); at most :data:`IMPOSSIBLE` for a class that `rows` are to leave out.
    """
    masked = may_hold_impossible(log_probabilities)
    targets = smoothed(target, _possible(rows, log_probabilities) if masked else rows, alpha)
    if masked:
        log_probabilities = log_probabilities.where(targets != 0, 0.0)  # 0 * (-inf) counts as 0
    losses = -(targets * log_probabilities).sum(dim=1)
    return losses.mean() if kept is None else losses.where(kept, 0.0).sum() / kept.sum()


def _possible(rows: Tensor, log_probabilities: Tensor) -> Tensor:
    """Restrict distributions (N, K) to the classes that are possible; a row that is left with nothing is zero.

    Where all classes are possible nothing changes, to the last bit.
    """
    impossible = log_probabilities.detach() <= IMPOSSIBLE
    left = rows.masked_fill(impossible, 0.0)
    total = left.sum(dim=1, keepdim=True).where(impossible.any(dim=1, keepdim=True), 1.0)
    return left / total.clamp_min(torch.finfo(left.dtype).tiny)


def may_hold_impossible(values: Tensor) -> bool:
    """Whether a value is so low; always on other devices than the CPU, where looking would cost a sync."""
    return values.device.type != "cpu" or (values.numel() > 0 and bool(values.detach().amin() <= IMPOSSIBLE))


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, smoothing: float = 0.0) -> Tensor:
    """Return ``F.cross_entropy``, which takes an `ignore_index` for class indices only.

    With soft targets, too, a class whose logit is -inf counts for nothing if its target is 0.
    """
    if target.is_floating_point():
        if not smoothing and may_hold_impossible(logits):
            impossible = logits.isneginf() & (target == 0)
            logits = logits.masked_fill(impossible, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=smoothing)
