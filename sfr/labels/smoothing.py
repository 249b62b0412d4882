"""Dynamic label smoothing: targets that move from one-hot towards what the network itself says of a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sfr.config import (
    DEFAULT_ALPHA,
    IGNORE_INDEX,
    Ramp,
    Smoothing,
    Update,
    check_alpha,
    check_choice,
    check_effect,
    check_num_samples,
    check_number,
    plain_number,
)
from sfr.labels.past_predictions import PastPredictions
from sfr.state import TensorState

# Above so many classes a step exchanges and updates only the rows of S whose class was seen. The host of an accelerator
# has to wait to know which, and is spared that as long as the whole of S is a small message (16 MiB).
ALL_ROWS_UP_TO = 2048
ALL_ROWS_ON_CPU_UP_TO = 128

STATISTICS = ("distributions", "sums", "counts")
NO_STATISTICS = (
    "the state holds no label statistics, which a run of {} steps has. torch.distributed.checkpoint loads no more than "
    "a fresh criterion's state_dict() names, and this one cannot know their size yet: state num_classes="
)

# Soft targets of half precision do not sum to 1 exactly; those of several labels an image are off by 1 or more.
SUM_TOLERANCE = 0.01
OTHER_LOSSES = (
    "For a regression or a single yes or no pass its loss, as in SFRLoss(model, label_loss=nn.MSELoss()) or "
    "label_loss=nn.BCEWithLogitsLoss()"
)
ONE_HOT = "If it is one-hot, pass target.argmax(dim=1), or target.float() as soft targets"
CLASSES_LAST = "Axis 1 of the logits is the classes; if yours are last, pass logits.movedim(-1, 1)"


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
    if not isinstance(distributions, Tensor) or not distributions.is_floating_point():
        kind = getattr(distributions, "dtype", type(distributions).__name__)
        raise TypeError(f"distributions must be a floating-point tensor; got {kind}")
    if distributions.ndim != 2 or distributions.shape[0] != distributions.shape[1]:
        raise ValueError(
            f"distributions must have shape (K, K), a row for each class; got {tuple(distributions.shape)}"
        )
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    classes = len(distributions)
    if target.is_floating_point():
        if target.ndim != 2 or target.shape[1] != classes:
            raise ValueError(f"target: soft targets must have shape (N, {classes}); got {tuple(target.shape)}")
        _check_sums(target, wait=False)
    else:
        if target.ndim != 1 or target.dtype == torch.bool:
            raise ValueError(f"target: class indices must have shape (N,); got {target.dtype} {tuple(target.shape)}")
        _check_range(target.long(), classes, None)
    return _smoothed(target, _rows_of(target, distributions), alpha)


def _rows_of(target: Tensor, distributions: Tensor) -> Tensor:
    """Return S[y], (N, K): the rows of the classes, or their mixtures by soft targets."""
    return (
        target.to(distributions.dtype) @ distributions if target.is_floating_point() else distributions[target.long()]
    )


def _smoothed(target: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) * onehot(y) + alpha * rows, (N, K)."""
    if target.is_floating_point():
        return (1 - alpha) * target.to(rows.dtype) + alpha * rows
    smoothed = alpha * rows
    smoothed[torch.arange(len(target), device=target.device), target.long()] += 1 - alpha
    return smoothed


class DynamicLabelSmoothing(TensorState):
    r"""Cross-entropy against targets smoothed by what the network itself said: of the class, or of the sample.

    .. math:: L = -\sum_k q_k \log p_k, \qquad q = (1 - \alpha_t)\,\mathrm{onehot}(y) + \alpha_t S_t[y]

    With "class_mean", S[y] is the mean softmax over the samples of class y that were classified correctly, uniform for
    a class not seen yet; the statistics are summed over all ranks. The target of a step uses S from before the step.
    "running" moves S at every training step by an exponential mean over samples (our reading); "epoch" collects over an
    epoch and replaces S in :meth:`end_epoch` (Zhang et al.), where a class without a correct sample keeps its row.

    Soft targets, as of MixUp and CutMix, count for their largest class and are left as they are, unless `alpha` or
    `alpha_end` is given: they are soft already, and smoothed as well lost more than the feature term brought
    (docs/accuracy.md).

    Where every image has many labels (segmentation), L is the mean over all labelled positions, and an image is one
    sample of each class y of which it has correct positions, with its mean softmax over them (our reading):

    .. math:: \bar p_{i,y} = \frac{1}{|C_{i,y}|} \sum_{u \in C_{i,y}} p_{i,u}, \qquad
              C_{i,y} = \{u : y_{i,u} = y = \arg\max_k p_{i,u,k}\}

    so that `momentum` means the same as in classification, and a large object no more than a small one.

    With "past" what takes the place of S[y] is the network's softmax for the same sample when it was last in a training
    step, and the one-hot label before that (Kim et al., PS-KD, ICCV 2021, arXiv 2006.12000, who let alpha rise from 0
    to 0.8 over the training). It is for classification with class indices: a mixed image has no past.

    A class whose logit is -inf is impossible for the sample: S leaves it out, so that the loss is finite wherever the
    plain cross-entropy is.

    In evaluation mode the loss is the plain cross-entropy and nothing is updated. An empty batch gives NaN, as there.

    Args:
        mode: "class_mean", "past", "uniform" (S = 1/K) or "none" (plain cross-entropy).
        alpha: share of S in the target, in [0, 1], or an :class:`sfr.Ramp`; None means 0.5, 0.5, 0.1 and 0 for the
            four modes.
        alpha_end, alpha_steps: another way to write ``alpha=Ramp(alpha, alpha_end, alpha_steps)``; both or neither.
        momentum: weight of one sample in the running mean, in (0, 1].
        update: "running" or "epoch".
        ignore_index: class index that marks a label to be left out, as in ``F.cross_entropy``; where all are, the loss
            is NaN, as there.
        num_samples: samples of the training set, >= 1; for "past" and for nothing else. See
            :class:`sfr.labels.past_predictions.PastPredictions` for the memory they take.
        sync: sum the statistics over the ranks of ``torch.distributed``: K x (K + 1) numbers a step; of more than 2048
            classes (128 on the CPU) K numbers, and K + 1 for each class seen in the step. With "past" the ranks
            exchange the predictions of the step.
        num_classes: K, >= 1; needed only where ``state_dict()`` must have the size of the statistics before the first
            logits, as for ``torch.distributed.checkpoint``.

    Example:
        >>> criterion = DynamicLabelSmoothing(mode="uniform", alpha=0.1)
        >>> logits, target = torch.randn(4, 10), torch.tensor([3, 1, 4, 1])
        >>> torch.allclose(criterion(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """

    state_names = ("step", *STATISTICS)
    required_names = ("step",)
    distributions: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        mode: Smoothing = "class_mean",
        alpha: float | Ramp | None = None,
        alpha_end: float | None = None,
        alpha_steps: int = 1,
        momentum: float = 0.01,
        update: Update = "running",
        ignore_index: int = IGNORE_INDEX,
        num_samples: int | None = None,
        sync: bool = True,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Smoothing)
        check_num_samples("mode", mode, num_samples)
        check_choice("update", update, Update)
        check_number("alpha_steps", alpha_steps, 1, whole=True)
        check_alpha(alpha, alpha_end, alpha_steps)
        check_number("momentum", momentum, 1e-6, 1)
        ramp = {"alpha": alpha, "alpha_end": alpha_end, "alpha_steps": alpha_steps}
        check_effect("mode", mode, {**ramp, "momentum": momentum, "update": update})
        check_number("ignore_index", ignore_index, -(2**63), 2**63 - 1, whole=True)
        self.mode, self.update, self.ignore_index, self.sync = mode, update, plain_number(ignore_index), sync
        self.smooth_soft_targets = not (alpha is None and alpha_end is None)
        start = DEFAULT_ALPHA[mode] if alpha is None else alpha
        end = start if alpha_end is None else alpha_end
        self.alpha = start if isinstance(start, Ramp) else Ramp(*map(plain_number, (start, end, alpha_steps)))
        self.momentum = plain_number(momentum)
        self.step = 0
        self._looked = False
        self.past = PastPredictions(num_samples, sync) if num_samples is not None else None
        self._forget()
        if num_classes is not None:
            check_number("num_classes", num_classes, 1, whole=True)
        self.num_classes = plain_number(num_classes)
        self.expect_classes(self.num_classes)

    def _forget(self) -> None:
        """Start the statistics anew."""
        # (K, K), (K, K) and (K,) once K is known: from the first logits or a state dict, whichever comes first. The
        # sums are those of an epoch; "running" has none.
        self.distributions, self.sums, self.counts = torch.empty(0, 0), torch.empty(0, 0), torch.empty(0)

    def expect_classes(self, number: int | None) -> None:
        """Tell the number of classes that the statistics in ``state_dict()`` have before the first logits."""
        self._expected_classes = number
        if self.past is not None:
            self.past.expected_classes = number

    def current_alpha(self) -> float:
        """Return the alpha of the next training step."""
        return self.alpha.at(self.step)

    @property
    def _is_idle(self) -> bool:
        return self.alpha.start == self.alpha.end == 0

    @property
    def exchanges(self) -> bool:
        """Whether a training step exchanges something with the other ranks, if there are any."""
        moved = self.mode == "past" or (self.mode == "class_mean" and not self._is_idle)
        return self.sync and moved

    def forward(self, logits: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the loss of one batch as a 0-d tensor.

        Args:
            logits: shape (B, K), or (B, K, ...) with one prediction at each position.
            target: class indices, shape (B,) or (B, ...), or soft targets of the shape of the logits.
            index: numbers of the samples in the training set, shape (B,); for "past", else of no effect.

        Raises:
            TypeError, ValueError: for logits, a target or an index of the wrong kind or shape, and, on the CPU, for a
                class index or a number out of range (reading those of another device would make the host wait).
        """
        # Where looking at the values makes the host wait, once is enough.
        target = checked_target(logits, target, self.ignore_index, wait=not self._looked)
        self._looked = True
        if not self.training or self.mode == "none" or self._is_idle:
            return cross_entropy(logits, target, self.ignore_index)
        if self.past is not None:
            return self._towards_the_past(self.past, logits, target, index)
        alpha = self.current_alpha()
        self.step += 1
        if self.mode == "uniform" and not _may_hold_infinity(logits):
            return cross_entropy(logits, target, self.ignore_index, alpha)
        log_probabilities = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        # One row for each position: (N, K).
        rows = log_probabilities.movedim(1, -1).reshape(-1, logits.shape[1])
        labels = target.movedim(1, -1).reshape(rows.shape) if target.is_floating_point() else target.flatten()
        if self.mode == "uniform":
            return self._smoothed_cross_entropy(rows, labels, alpha)
        self._prepare(log_probabilities)
        if target.is_floating_point() and not self.smooth_soft_targets:
            loss = cross_entropy(logits, target, self.ignore_index)
        else:
            loss = self._smoothed_cross_entropy(rows, labels, alpha)
        # Soft targets count in any case: other ranks may have class indices in this step, and wait for the sums.
        self._observe(rows.detach(), labels, images=len(logits))
        return loss

    def _towards_the_past(self, past: PastPredictions, logits: Tensor, target: Tensor, index: Tensor | None) -> Tensor:
        if logits.ndim != 2 or target.is_floating_point():
            raise ValueError(
                "the term of past predictions needs logits of shape (B, K) and class indices: a mixed image has no "
                f"past; got logits {tuple(logits.shape)} and a {target.dtype} target"
            )
        index = past.checked(index, len(logits))
        alpha = self.current_alpha()
        self.step += 1
        log_probabilities = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        kept = target != self.ignore_index
        target = target.where(kept, 0)
        onehot = F.one_hot(target, logits.shape[1]).to(log_probabilities)
        recalled = past.recall(index, otherwise=onehot)
        past.remember(index, log_probabilities.detach().exp())
        return _cross_entropy_towards(target, recalled, alpha, log_probabilities, kept)

    def _smoothed_cross_entropy(self, log_probabilities: Tensor, target: Tensor, alpha: float) -> Tensor:
        kept = None if target.is_floating_point() else target != self.ignore_index
        target = target if kept is None else target.where(kept, 0)
        rows = log_probabilities.new_tensor(1.0 / log_probabilities.shape[1]).expand_as(log_probabilities)
        if self.mode == "class_mean":
            rows = _rows_of(target, self.distributions)
        return _cross_entropy_towards(target, rows, alpha, log_probabilities, kept)

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
        self.distributions.copy_(torch.where(seen, means, self.distributions))
        self.sums.zero_()
        self.counts.zero_()

    def _prepare(self, like: Tensor) -> None:
        """Create the statistics at the first logits, or bring restored ones to their device and dtype."""
        classes = like.shape[1]
        if not len(self.distributions):
            if self.num_classes not in (None, classes):
                raise ValueError(f"num_classes={self.num_classes}, and the logits have {classes}")
            with torch.inference_mode(False):  # tensors made inside it could not be written into outside
                self._set_statistics(self._beginning(classes, like))
        elif len(self.distributions) != classes:
            raise ValueError(
                f"the label statistics are of {len(self.distributions)} classes; the logits have {classes}. "
                "For a model with another head make a new criterion"
            )
        elif (self.distributions.device, self.distributions.dtype) != (like.device, like.dtype):
            with torch.inference_mode(False):
                self._set_statistics({name: getattr(self, name).to(like) for name in STATISTICS})

    def _beginning(self, classes: int, like: Tensor) -> dict[str, Tensor]:
        """Return the statistics of no sample."""
        statistics = {"distributions": like.new_full((classes, classes), 1.0 / classes)}
        if self.update == "epoch":
            statistics["sums"] = like.new_zeros(classes, classes)
        return {**statistics, "counts": like.new_zeros(classes)}

    def _set_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        for name, value in statistics.items():
            setattr(self, name, value)

    @torch.no_grad()
    def _observe(self, log_probabilities: Tensor, target: Tensor, images: int) -> None:
        """Add the correctly classified samples of all ranks to the class statistics."""
        label = target.argmax(dim=1) if target.is_floating_point() else target.where(target != self.ignore_index, -1)
        largest, predicted = log_probabilities.max(dim=1)
        # NaN is the largest of a row that holds one: a prediction that is not finite is not correct.
        label = label.where((predicted == label) & ~largest.isnan(), -1)
        classes = self._classes_seen(label)
        sums, counts = _class_sums(log_probabilities, label, classes, images)
        batch = torch.cat([sums, counts[:, None]], dim=1)
        self._sum_over_ranks(batch)
        sums, counts = batch[:, :-1], batch[:, -1]
        total = self.counts.index_select(0, classes) + counts
        self.counts.index_copy_(0, classes, total)
        if self.update == "epoch":
            self.sums.index_add_(0, classes, sums)
        else:
            # A plain mean of the first 1/momentum samples of a class, an exponential one from there on.
            share = torch.maximum(1 - (1 - self.momentum) ** counts, counts / total.clamp_min(1))
            means = sums / counts.clamp_min(1)[:, None]
            moved = self.distributions.index_select(0, classes).lerp(means, share[:, None])
            self.distributions.index_copy_(0, classes, moved)

    def _classes_seen(self, label: Tensor) -> Tensor:
        """Return the classes whose statistics this step may move, the same on all ranks."""
        number = len(self.distributions)
        if number <= (ALL_ROWS_ON_CPU_UP_TO if label.device.type == "cpu" else ALL_ROWS_UP_TO):
            return torch.arange(number, device=label.device)
        seen = torch.bincount(label + 1, minlength=number + 1)[1:]
        self._sum_over_ranks(seen)
        return seen.nonzero().squeeze(1)

    def _sum_over_ranks(self, values: Tensor) -> None:
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the step, and the statistics if the number of classes is known."""
        statistics = {name: getattr(self, name) for name in STATISTICS if len(getattr(self, name))}
        if not statistics and self.mode == "class_mean" and self._expected_classes is not None:
            statistics = self._beginning(self._expected_classes, like=torch.empty(0))
        return {"step": torch.tensor(self.step), **statistics}

    def load_tensor_state(self, state: Mapping[str, Any]) -> None:
        """Restore the step and, unless it is the first, the statistics; called by ``load_state_dict``."""
        self.step = int(state["step"])
        self._forget()
        if self.step:
            self._set_statistics({name: state[name] for name in STATISTICS if len(state.get(name, ()))})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        of_past = any(key.startswith(f"{prefix}past.") for key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        needed = {"class_mean": len(self.distributions) == len(self.counts) > 0, "past": of_past}
        if self.step and not needed.get(self.mode, True):
            rest[-1].append(NO_STATISTICS.format(self.step))  # the list of errors

    def extra_repr(self) -> str:
        return f"mode={self.mode}, alpha={self.alpha}, update={self.update}"


def _cross_entropy_towards(
    target: Tensor, rows: Tensor, alpha: float, log_probabilities: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the rows that are `kept` (N,), or of all; NaN if there is none.

    Args:
        target: class indices (N,) or soft targets (N, K).
        rows: the distributions (N, K) that share the target with it, by `alpha`.
        log_probabilities: shape (N, K); -inf for a class that is not possible, which `rows` then leave out.
    """
    masked = _may_hold_infinity(log_probabilities)
    targets = _smoothed(target, _possible(rows, log_probabilities) if masked else rows, alpha)
    if masked:
        log_probabilities = log_probabilities.where(targets != 0, 0.0)  # 0 * (-inf) counts as 0
    losses = -(targets * log_probabilities).sum(dim=1)
    return losses.mean() if kept is None else losses.where(kept, 0.0).sum() / kept.sum()


def _possible(rows: Tensor, log_probabilities: Tensor) -> Tensor:
    """Restrict distributions (N, K) to the classes that are possible; a row that is left with nothing is zero.

    Where all classes are possible nothing changes, to the last bit.
    """
    impossible = log_probabilities.detach().isneginf()
    left = rows.masked_fill(impossible, 0.0)
    total = left.sum(dim=1, keepdim=True).where(impossible.any(dim=1, keepdim=True), 1.0)
    return left / total.clamp_min(torch.finfo(left.dtype).tiny)


def _may_hold_infinity(values: Tensor) -> bool:
    """Whether -inf is among the values; always on other devices than the CPU, where looking would cost a sync."""
    return values.device.type != "cpu" or (values.numel() > 0 and bool(values.detach().amin() == -torch.inf))


def _class_sums(log_probabilities: Tensor, label: Tensor, classes: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return sum (M, K) and number (M,) of the samples of each of the M `classes`, given N rows; -1 is no sample.

    With one row an image each is a sample; else an image is a sample of each class in it, with the mean of its rows.
    """
    if len(label) == images:
        return _row_sums(log_probabilities, label, classes)
    sums = log_probabilities.new_zeros(len(classes), log_probabilities.shape[1])
    counts = log_probabilities.new_zeros(len(classes))
    # One image at a time: the memberships of a whole batch would be as large as its logits.
    for rows, labels in zip(log_probabilities.chunk(images), label.chunk(images), strict=True):
        image_sums, positions = _row_sums(rows, labels, classes)
        sums += image_sums / positions.clamp_min(1)[:, None]
        counts += positions > 0
    return sums, counts


def _row_sums(log_probabilities: Tensor, label: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the probabilities (M, K) and the number (M,) of the rows of each class."""
    members = (classes[:, None] == label).to(log_probabilities.dtype)
    # What is no sample may be NaN, and must not reach the sums even times zero.
    probabilities = torch.where((label >= 0)[:, None], log_probabilities.exp(), 0.0)
    return members @ probabilities, members.sum(dim=1)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, smoothing: float = 0.0) -> Tensor:
    """Return ``F.cross_entropy``, which takes an `ignore_index` for class indices only.

    With soft targets, too, a class whose logit is -inf counts for nothing if its target is 0.
    """
    if target.is_floating_point():
        if not smoothing and _may_hold_infinity(logits):
            impossible = logits.isneginf() & (target == 0)
            logits = logits.masked_fill(impossible, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=smoothing)


def checked_target(logits: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX, *, wait: bool = False) -> Tensor:
    """Return the target as ``F.cross_entropy`` takes it, or raise an error that says what does not fit.

    Values are looked at on the CPU, and the sums of soft targets elsewhere, too, if the host may `wait` for them.
    """
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            "logits must be floating, of shape (B, K) or (B, K, ...) with the classes on axis 1; "
            f"got {logits.dtype} {tuple(logits.shape)}. {OTHER_LOSSES}"
        )
    if logits.shape[1] == 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} have one class, whose cross-entropy is always 0. {OTHER_LOSSES}"
        )
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target: soft targets must have the shape of the logits, {tuple(logits.shape)}; "
                f"got {tuple(target.shape)}"
            )
        _check_sums(target, wait)
        return target
    expected = (logits.shape[0], *logits.shape[2:])
    if target.shape != expected:
        one_hot = target.shape == logits.shape
        raise ValueError(
            f"target: class indices must have shape {expected} for logits of shape {tuple(logits.shape)}; got "
            f"{tuple(target.shape)}. {ONE_HOT if one_hot else CLASSES_LAST}"
        )
    target = target.long()
    _check_range(target, logits.shape[1], ignore_index)
    return target


def _check_sums(target: Tensor, wait: bool) -> None:
    """Raise unless soft targets, with the classes on axis 1, are distributions."""
    if target.device.type != "cpu" and not wait:
        return
    sums = target.detach().sum(dim=1, dtype=torch.promote_types(target.dtype, torch.float32))
    wrong = sums[~((sums - 1).abs() <= SUM_TOLERANCE)]
    if len(wrong):
        raise ValueError(
            "target: the rows of soft targets must sum to 1 over the classes, on axis 1; got a sum of "
            f"{wrong[0].item():g}. For several labels an image pass another loss, as in "
            "SFRLoss(model, label_loss=nn.BCEWithLogitsLoss())"
        )


def _check_range(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise unless class indices are in range; checked on the CPU only, to avoid a device sync."""
    if target.device.type != "cpu":
        return
    outside = (target < 0) | (target >= classes)
    wrong = target[outside if ignore_index is None else outside & (target != ignore_index)]
    if len(wrong):
        ignored = "" if ignore_index is None else f" or be ignore_index={ignore_index}"
        raise ValueError(
            f"target: class indices must lie in [0, {classes - 1}]{ignored}; "
            f"got values from {wrong.min().item()} to {wrong.max().item()}"
        )
