"""Dynamic label smoothing: targets that move from one-hot towards what the network itself says of a class."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sfr.config import DEFAULT_ALPHA, Smoothing, Update, check_choice, check_number


def smooth_labels(target: Tensor, distributions: Tensor, alpha: float) -> Tensor:
    """Return the smoothed target distributions ``(1 - alpha) * onehot(y) + alpha * S[y]``.

    Args:
        target: class indices, shape (B,), or soft targets, shape (B, K); soft targets take the one-hot's place and
            mix the rows of S in the same proportions.
        distributions: S, one distribution per class, shape (K, K).
        alpha: share of S in the target, in [0, 1].

    Returns:
        Distributions of shape (B, K), in the dtype of `distributions`.

    Reference:
        Zhang et al., Delving Deep into Label Smoothing, arXiv 2011.12562, with ``1 - alpha`` where they write alpha.

    Example:
        >>> smooth_labels(torch.tensor([1]), torch.full((2, 2), 0.5), alpha=0.2)
        tensor([[0.1000, 0.9000]])
    """
    if target.is_floating_point():
        soft = target.to(distributions.dtype)
        return (1 - alpha) * soft + alpha * (soft @ distributions)
    onehot = F.one_hot(target, len(distributions)).to(distributions.dtype)
    return (1 - alpha) * onehot + alpha * distributions[target]


class DynamicLabelSmoothing(nn.Module):
    r"""Cross-entropy against targets smoothed by the network's own mean prediction for each class.

    .. math:: L = -\sum_k q_k \log p_k, \qquad q = (1 - \alpha_t)\,\mathrm{onehot}(y) + \alpha_t S_t[y]

    With "class_mean", S[y] is the mean softmax over the samples of class y that were classified correctly, uniform for
    a class not seen yet; the statistics are summed over all ranks. The target of a step uses S from before the step.
    With soft targets a sample counts for its largest class. "running" moves S at every training step by an
    exponential mean over samples (our reading); "epoch" collects over an epoch and replaces S in :meth:`end_epoch`
    (Zhang et al.), where a class without a correct sample keeps its row.

    In evaluation mode the loss is the plain cross-entropy and nothing is updated.

    Args:
        mode: "class_mean", "uniform" (S = 1/K) or "none" (plain cross-entropy).
        alpha: share of S in the target, in [0, 1]; None means 0.5, 0.1 and 0 for the three modes.
        alpha_end: if given, alpha moves linearly to it over `alpha_steps` training steps.
        alpha_steps: length of that move, >= 1.
        momentum: weight of one sample in the running mean, in (0, 1].
        update: "running" or "epoch".
        sync: sum the statistics over the ranks of ``torch.distributed`` (K x (K + 1) numbers a step).

    Example:
        >>> criterion = DynamicLabelSmoothing(mode="uniform", alpha=0.1)
        >>> logits, target = torch.randn(4, 10), torch.tensor([3, 1, 4, 1])
        >>> torch.allclose(criterion(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """

    distributions: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        mode: Smoothing = "class_mean",
        alpha: float | None = None,
        alpha_end: float | None = None,
        alpha_steps: int = 1,
        momentum: float = 0.01,
        update: Update = "running",
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Smoothing)
        check_choice("update", update, Update)
        alpha = DEFAULT_ALPHA[mode] if alpha is None else alpha
        alpha_end = alpha if alpha_end is None else alpha_end
        check_number("alpha", alpha, 0, 1)
        check_number("alpha_end", alpha_end, 0, 1)
        check_number("alpha_steps", alpha_steps, 1, whole=True)
        check_number("momentum", momentum, 1e-6, 1)
        self.mode, self.update, self.sync = mode, update, sync
        self.alpha, self.alpha_end, self.alpha_steps = alpha, alpha_end, alpha_steps
        self.momentum = momentum
        self.step = 0
        # (K, K), (K, K) and (K,) once K is known: from the first logits or a state dict, whichever comes first.
        self.distributions, self.sums = torch.empty(0, 0), torch.empty(0, 0)
        self.counts = torch.empty(0)

    def current_alpha(self) -> float:
        """Return the alpha of the next training step."""
        return self.alpha + (self.alpha_end - self.alpha) * min(1.0, self.step / self.alpha_steps)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K) against class indices (B,) or soft targets (B, K), as a 0-d tensor.

        Raises:
            TypeError, ValueError: for logits or a target of the wrong kind or shape, and, on the CPU, for a class
                index out of range (reading the indices of another device would make the host wait).
        """
        target = checked_target(logits, target)
        if not self.training or self.mode == "none" or self.alpha == self.alpha_end == 0:
            return F.cross_entropy(logits, target)
        alpha = self.current_alpha()
        self.step += 1
        if self.mode != "class_mean":
            return F.cross_entropy(logits, target, label_smoothing=alpha)
        log_probabilities = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        self._prepare(log_probabilities)
        smoothed = smooth_labels(target, self.distributions, alpha)
        self._observe(log_probabilities.detach().exp(), target)
        return -(smoothed * log_probabilities).sum(dim=1).mean()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Replace S by the means collected since the last call; needed with ``update="epoch"`` only.

        Raises:
            RuntimeError: with ``update="running"``, whose S moves by itself.
        """
        if self.update != "epoch":
            raise RuntimeError("end_epoch() belongs to update='epoch'; with 'running' the class means need no call")
        seen = (self.counts > 0)[:, None]
        means = self.sums / self.counts.clamp_min(1)[:, None]
        self.distributions = torch.where(seen, means, self.distributions)
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

    def _prepare(self, like: Tensor) -> None:
        """Create the statistics at the first logits, or bring restored ones to their device."""
        classes = like.shape[1]
        if not len(self.distributions):
            self.distributions = like.new_full((classes, classes), 1.0 / classes)
            self.sums = like.new_zeros(classes, classes)
            self.counts = like.new_zeros(classes)
        elif len(self.distributions) != classes:
            raise ValueError(
                f"the label statistics are of {len(self.distributions)} classes; the logits have {classes}"
            )
        elif self.distributions.device != like.device:
            self.distributions, self.sums, self.counts = (
                state.to(like.device) for state in (self.distributions, self.sums, self.counts)
            )

    @torch.no_grad()
    def _observe(self, probabilities: Tensor, target: Tensor) -> None:
        """Add the correctly classified samples of all ranks to the class statistics."""
        label = target.argmax(dim=1) if target.is_floating_point() else target
        # A sample whose prediction is not finite is not correct, and must not reach the sums even times zero.
        correct = (probabilities.argmax(dim=1) == label) & probabilities.isfinite().all(dim=1)
        probabilities = torch.where(correct[:, None], probabilities, 0.0)
        members = F.one_hot(label, probabilities.shape[1]).to(probabilities.dtype) * correct[:, None]
        batch = torch.cat([members.T @ probabilities, members.sum(dim=0)[:, None]], dim=1)
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(batch)
        sums, counts = batch[:, :-1], batch[:, -1]
        self.counts = self.counts + counts
        if self.update == "epoch":
            self.sums = self.sums + sums
        else:
            # A plain mean of the first 1/momentum samples of a class, an exponential one from there on.
            share = torch.maximum(1 - (1 - self.momentum) ** counts, counts / self.counts.clamp_min(1))
            means = sums / counts.clamp_min(1)[:, None]
            self.distributions = self.distributions.lerp(means, share[:, None])

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step and the statistics; called by ``state_dict``."""
        names = ("step", "distributions", "sums", "counts")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave; called by ``load_state_dict``."""
        for name, value in state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, alpha={self.alpha}, alpha_end={self.alpha_end}, update={self.update}"


def checked_target(logits: Tensor, target: Tensor) -> Tensor:
    """Return the target as ``F.cross_entropy`` takes it, or raise an error that says what does not fit."""
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating, of shape (B, K); got {logits.dtype} {tuple(logits.shape)}")
    batch, classes = logits.shape
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(f"soft targets must have shape {(batch, classes)}; got {tuple(target.shape)}")
        return target
    if target.shape != (batch,):
        raise ValueError(f"class indices must have shape {(batch,)}; got {tuple(target.shape)}")
    if target.device.type == "cpu" and batch and not 0 <= target.min() <= target.max() < classes:
        low, high = target.min().item(), target.max().item()
        raise ValueError(f"class indices must lie in [0, {classes - 1}]; got values from {low} to {high}")
    return target.long()
