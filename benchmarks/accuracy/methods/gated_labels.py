"""sfr whose label smoothing is the weaker, the less of the labels the network knows: three rules, one variant each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sfr
from benchmarks.accuracy.methods.arm import Task
from benchmarks.accuracy.methods.self_feature import SelfFeature
from sfr.config import DEFAULT_ALPHA
from sfr.labels.class_means import ClassMeans
from sfr.labels.source import Batch

MEMORY = 0.98  # of the share of a class that is known, by sample


class GatedLabels(SelfFeature):
    """Self-feature regularization with a gate in its label term, the class means with their defaults.

    Options but `gate` are fields of :class:`sfr.SFRConfig`; of those of the label term `alpha` alone has an effect.

    With "class" alpha is multiplied by the share of the class's latest samples, about 50, that were classified
    correctly; with "sample" it is zero for each sample that is not at this moment. With "onehot" alpha stays, but the
    rows of S start as the one-hot labels, and a sample that is not classified correctly counts in them as its label.
    """

    def __init__(self, task: Task, gate: str = "class", **config: Any) -> None:
        super().__init__(task, **config)
        alpha = self.criterion.config.alpha
        if isinstance(alpha, sfr.Ramp):
            raise ValueError(f"a gate needs a constant alpha; got {alpha}")
        alpha = DEFAULT_ALPHA["class_mean"] if alpha is None else alpha
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}; got {gate!r}")
        self.criterion.labels = GATES[gate](alpha, task.num_classes)


class KnownClasses(sfr.DynamicLabelSmoothing):
    """Smooths a class's labels in proportion to how many of its samples are classified correctly."""

    known: Tensor

    def __init__(self, alpha: float, num_classes: int) -> None:
        super().__init__(alpha=alpha)
        self.register_buffer("known", torch.zeros(num_classes))

    def _towards(self, batch: Batch, rows: Tensor, alpha: float) -> Tensor:
        target = batch.labels
        loss = gated_cross_entropy(batch, rows, alpha * self.known[target])
        counts = target.bincount(minlength=len(self.known)).float()
        correct = target.bincount(is_correct(batch).float(), minlength=len(self.known))
        self.known = self.known.lerp(correct / counts.clamp_min(1), 1 - MEMORY**counts)
        return loss


class KnownSamples(sfr.DynamicLabelSmoothing):
    """Smooths the labels of the samples that are classified correctly."""

    def __init__(self, alpha: float, num_classes: int) -> None:
        super().__init__(alpha=alpha)

    def _towards(self, batch: Batch, rows: Tensor, alpha: float) -> Tensor:
        return gated_cross_entropy(batch, rows, alpha * is_correct(batch).float())


class OneHotOfUnknown(sfr.DynamicLabelSmoothing):
    """Counts a sample that is not classified correctly in the class means, as its one-hot label."""

    def __init__(self, alpha: float, num_classes: int) -> None:
        super().__init__(alpha=alpha, num_classes=num_classes)
        self.means = OneHotMeans(self.momentum)
        self.expect_classes(num_classes)


class OneHotMeans(ClassMeans):
    """Begins with the one-hot labels, and counts a sample that is not classified correctly as its label."""

    def beginning(self, classes: int, like: Tensor) -> dict[str, Tensor]:
        return {"distributions": torch.eye(classes).to(like), "counts": like.new_zeros(classes)}

    def observe(self, batch: Batch) -> None:
        onehot = F.one_hot(batch.labels, batch.log_probabilities.shape[1]).to(batch.log_probabilities)
        counted = torch.where(is_correct(batch)[:, None], batch.log_probabilities, onehot.log())
        super().observe(batch._replace(log_probabilities=counted))


GATES: dict[str, type[KnownClasses | KnownSamples | OneHotOfUnknown]] = {
    "class": KnownClasses,
    "sample": KnownSamples,
    "onehot": OneHotOfUnknown,
}


def is_correct(batch: Batch) -> Tensor:
    return batch.log_probabilities.argmax(dim=1) == batch.labels


def gated_cross_entropy(batch: Batch, rows: Tensor, alpha: Tensor) -> Tensor:
    """Return the mean cross-entropy, 0-d, against the labels smoothed towards rows (N, K) by alpha (N,)."""
    onehot = F.one_hot(batch.labels, batch.log_probabilities.shape[1]).to(batch.log_probabilities)
    smoothed = (1 - alpha[:, None]) * onehot + alpha[:, None] * rows
    return -(smoothed * batch.log_probabilities).sum(dim=1).mean()
