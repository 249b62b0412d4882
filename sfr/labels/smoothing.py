"""DynamicLabelSmoothing: targets that move from one-hot towards what the network itself says of a class or a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfr.checks import check_choice, check_number, plain_number
from sfr.config import IGNORE_INDEX, Ramp, todays_switches
from sfr.label_switches import (
    DEFAULT_ALPHA,
    Smoothing,
    Update,
    check_alpha,
    check_early_learning,
    check_effect,
    check_momentum,
    check_num_samples,
    momentum_of,
)
from sfr.labels.class_means import STATISTICS, ClassMeans
from sfr.labels.cross_entropy import cross_entropy, cross_entropy_towards, may_hold_impossible
from sfr.labels.early_learning import agreed, share_of_early
from sfr.labels.on_a_device import LabelStep, Source, loss_on_a_device
from sfr.labels.past_predictions import PastPredictions
from sfr.labels.source import Batch
from sfr.labels.targets import checked_target, smooth_labels
from sfr.old_names import OLD_NAMES
from sfr.state import TensorState
from sfr.warn import deprecated

__all__ = ["DynamicLabelSmoothing", "smooth_labels"]

NO_STATISTICS = (
    "the state holds no label statistics, which a run of {} steps has. torch.distributed.checkpoint loads no more than "
    "a fresh criterion's state_dict() names, and this one cannot know their size yet: state num_classes="
)


class DynamicLabelSmoothing(TensorState):
    r"""Cross-entropy against targets smoothed by what the network itself said: of the class, or of the sample.

    .. math:: L = -\sum_k q_k \log p_k, \qquad q = (1 - \alpha_t)\,\mathrm{onehot}(y) + \alpha_t S_t[y]

    With "class_mean", S[y] is the mean softmax over the samples of class y that were classified correctly, uniform for
    a class not seen yet; the statistics are summed over all ranks. The target of a step uses S from before the step.
    "running" moves S at every training step by an exponential mean over samples (our reading); "epoch" collects over an
    epoch and replaces S in :meth:`end_epoch` (Zhang et al.), where a class without a correct sample keeps its row.

    Soft targets, as of MixUp and CutMix, count for their largest class and are left as they are, unless `alpha` is
    given: they are soft already, and smoothed as well lost more than the feature term brought
    (docs/accuracy.md).

    Where every image has many labels (segmentation), L is the mean over all labelled positions, and an image is one
    sample of each class y of which it has correct positions, with its mean softmax over them (our reading):

    .. math:: \bar p_{i,y} = \frac{1}{|C_{i,y}|} \sum_{u \in C_{i,y}} p_{i,u}, \qquad
              C_{i,y} = \{u : y_{i,u} = y = \arg\max_k p_{i,u,k}\}

    so that `momentum` means the same as in classification, and a large object no more than a small one.

    With "past" what takes the place of S[y] is the network's softmax for the same sample when it was last in a training
    step, and the one-hot label before that (Kim et al., PS-KD, ICCV 2021, arXiv 2006.12000, who let alpha rise from 0
    to 0.8 over the training); with a momentum below 1 it is a running mean of all that was said of the sample. It is
    for classification with class indices: a mixed image has no past. With `early_learning` = w the loss of a sample is

    .. math:: L_i + w \log(1 - \langle t_i, p_i \rangle)

    with p its softmax and t the running mean, which has taken in this p already and starts at zero (ELR: Liu et al.,
    NeurIPS 2020, arXiv 2007.00151). We do not let 1 - <t, p> fall below 1e-4, and t, kept in half precision, comes no
    nearer to p than about 2.4e-4 / momentum. Of fewer than ten classes, which they did not try, the term counts by
    (K - 1) / 9 only: w = 3 made networks of two classes say one class of everything.

    A class whose logit is -inf, or a thousand below others as behind a mask of -1e4, is impossible for the sample: S
    leaves it out, so that the loss is finite and moderate wherever the plain cross-entropy is.

    In evaluation mode the loss is the plain cross-entropy and nothing is updated. An empty batch gives NaN, as there.

    Args:
        mode: "class_mean", "past", "uniform" (S = 1/K) or "none" (plain cross-entropy).
        alpha: share of S in the target, in [0, 1], or an :class:`sfr.Ramp`; None means 0.5, 0.5, 0.1 and 0 for the
            four modes.
        momentum: weight of one sample in the running means of the classes, in (0, 1], or of the newest prediction in
            that of each sample; None means 0.01 and 1, with `early_learning` 0.3, which needs less than 1.
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
        early_learning: w, >= 0; with "past".
        alpha_end, alpha_steps: deprecated; ``alpha=Ramp(alpha, alpha_end, alpha_steps)``.

    Example:
        >>> import torch.nn.functional as F
        >>> criterion = DynamicLabelSmoothing(mode="uniform", alpha=0.1)
        >>> logits, target = torch.randn(4, 10), torch.tensor([3, 1, 4, 1])
        >>> torch.allclose(criterion(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """

    state_names = ("step", *STATISTICS)
    required_names = ("step",)

    def __init__(
        self,
        mode: Smoothing = "class_mean",
        alpha: float | Ramp | None = None,
        momentum: float | None = None,
        update: Update = "running",
        ignore_index: int = IGNORE_INDEX,
        num_samples: int | None = None,
        sync: bool = True,
        num_classes: int | None = None,
        *,
        early_learning: float | Ramp = 0.0,
        alpha_end: float | None = None,
        alpha_steps: int = 1,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Smoothing)
        check_num_samples("mode", mode, num_samples)
        check_choice("update", update, Update)
        if alpha_end is not None or alpha_steps != 1:
            old = {"alpha_end": alpha_end, "alpha_steps": alpha_steps}
            deprecated("DynamicLabelSmoothing", {name: OLD_NAMES[name] for name in old})
            alpha = todays_switches({"smoothing": mode, "alpha": alpha, **old})["alpha"]
        check_alpha(alpha)
        check_momentum(momentum)
        check_early_learning(early_learning, momentum)
        given = {"alpha": alpha, "momentum": momentum, "update": update, "early_learning": early_learning}
        check_effect("mode", mode, given)
        check_number("ignore_index", ignore_index, -(2**63), 2**63 - 1, whole=True)
        if num_classes is not None:
            check_number("num_classes", num_classes, 1, whole=True)
        self.mode, self.update = mode, update
        self.momentum = plain_number(momentum_of(mode, momentum, early_learning))
        self.early_learning = Ramp.of(plain_number(early_learning))
        self.ignore_index = plain_number(ignore_index)
        self.alpha = Ramp.of(DEFAULT_ALPHA[mode] if alpha is None else alpha)
        self.smooth_soft_targets = alpha is not None
        self.step = self._step_before = 0
        self._looked = False
        self.means = ClassMeans(self.momentum, update, sync) if mode == "class_mean" else None
        self.past = PastPredictions(num_samples, sync, self.momentum) if num_samples is not None else None
        self.num_classes = plain_number(num_classes)
        self.expect_classes(self.num_classes)

    @property
    def source(self) -> Source | None:
        """Where the distributions come from that targets are smoothed towards; None for "uniform" and "none"."""
        return self.means or self.past

    @property
    def distributions(self) -> Tensor:
        """S of "class_mean", shape (K, K); (0, 0) until K is known."""
        return self.means.distributions if self.means else torch.empty(0, 0)

    @property
    def counts(self) -> Tensor:
        """Correct samples that S has seen of each class, shape (K,); (0,) until K is known."""
        return self.means.counts if self.means else torch.empty(0)

    @property
    def sums(self) -> Tensor:
        """With ``update="epoch"`` the sums of the distributions of this epoch, shape (K, K)."""
        return self.means.sums if self.means else torch.empty(0, 0)

    @property
    def sync(self) -> bool:
        """Whether the statistics are summed over the ranks."""
        return self.source is not None and self.source.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        if self.source is not None:
            self.source.sync = value

    def expect_classes(self, number: int | None) -> None:
        """Tell the number of classes that the statistics in ``state_dict()`` have before the first logits."""
        if self.means is not None:
            self.means.expected_classes = number
        if self.past is not None:
            self.past.expected_classes = number

    def current_alpha(self) -> float:
        """Return the alpha of the next training step."""
        return self.alpha.at(self.step)

    @property
    def _is_idle(self) -> bool:
        return self.alpha.largest == self.early_learning.largest == 0

    @property
    def exchanges(self) -> bool:
        """Whether a training step exchanges something with the other ranks, if there are any."""
        return self.sync and not self._is_idle

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
        self._looked, self._step_before = True, self.step
        if not self.training or self._is_idle:
            return cross_entropy(logits, target, self.ignore_index)
        self._check_source(logits, target, index)
        alpha, early = self.current_alpha(), self.early_learning.at(self.step) * share_of_early(logits.shape[1])
        self.step += 1
        if self.source is None and not may_hold_impossible(logits):
            return cross_entropy(logits, target, self.ignore_index, alpha)
        return self._towards_the_source(logits, LabelStep(target, self.source, index, alpha, early, self.ignore_index))

    def repeat_step(self) -> None:
        """Let the next call be one more of the step that the last one was, as for the two labels of MixUp.

        Raises:
            ValueError: with "past", as a mixed image has none.
        """
        if self.past is not None:
            raise ValueError(
                "past predictions take one call a step: several with the same logits, as for the two labels of MixUp, "
                "are of mixed images, which have no past"
            )
        self.step = self._step_before

    def _check_source(self, logits: Tensor, target: Tensor, index: Tensor | None) -> None:
        if self.source is None:
            return
        self.source.check(logits, target, index)
        if self.num_classes not in (None, logits.shape[1]):
            raise ValueError(f"num_classes={self.num_classes}, and the logits have {logits.shape[1]}")

    def _towards_the_source(self, logits: Tensor, step: LabelStep) -> Tensor:
        found = loss_on_a_device(logits, step)
        if found is not None:
            return found
        batch = Batch.of(logits, step.target, step.ignore_index, step.numbers)
        if self.source is None:
            uniform = batch.log_probabilities.new_tensor(1.0 / logits.shape[1]).expand_as(batch.log_probabilities)
            return self._towards(batch, uniform, step.alpha)
        if step.target.is_floating_point() and not self.smooth_soft_targets:
            loss = cross_entropy(logits, step.target, step.ignore_index)
        else:
            loss = self._towards(batch, self.source.recall(batch), step.alpha)
        # Soft targets count in any case: other ranks may have class indices in this step, and wait for the sums.
        self.source.observe(batch.detached())
        if self.past is not None and step.early_learning:
            loss = loss + step.early_learning * agreed(self.past.running_means(batch), batch)
        return loss

    def _towards(self, batch: Batch, rows: Tensor, alpha: float) -> Tensor:
        """Return the mean cross-entropy towards the labels and, with the share `alpha`, the distributions (N, K)."""
        return cross_entropy_towards(batch.labels, rows, alpha, batch.log_probabilities, batch.kept)

    def end_epoch(self) -> None:
        """With ``update="epoch"``, replace S by the means collected since the last call; else nothing is to be done."""
        if self.means is not None:
            self.means.end_epoch()

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the step, and the statistics if the number of classes is known."""
        return super().tensor_state() | (self.means.state() if self.means else {})

    def load_tensor_state(self, state: Mapping[str, Any]) -> None:
        """Restore the step and, unless it is the first, the statistics; called by ``load_state_dict``."""
        super().load_tensor_state(state)
        if self.means is not None:
            self.means.restore(state if self.step else {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        of_past = any(key.startswith(f"{prefix}past.") for key in state_dict)
        if self.means is None:  # of another kind of smoothing, which this one does not go on with
            rest[3].extend(prefix + name for name in STATISTICS if prefix + name in state_dict)  # the unexpected keys
        super()._load_from_state_dict(state_dict, prefix, *rest)
        needed = {"class_mean": len(self.distributions) == len(self.counts) > 0, "past": of_past}
        if self.step and not needed.get(self.mode, True):
            rest[-1].append(NO_STATISTICS.format(self.step))  # the list of errors

    def extra_repr(self) -> str:
        return f"mode={self.mode}, alpha={self.alpha}"
