"""sfr whose label smoothing is the weaker, the less of the labels the network knows: three rules, one variant each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.methods.arm import Task
from benchmarks.accuracy.methods.self_feature import SelfFeature
from sfr.labels.class_means import ClassMeans
from sfr.labels.source import Batch

MEMORY = 0.98  # of the share of a class that is known, by sample


class GatedLabels(SelfFeature):
    """Self-feature regularization with a gate in its label term, the class means with their default momentum.

    Options but `gate` are fields of :class:`sfr.SFRConfig`.

    With "class" alpha is multiplied by the share of the class's latest samples, about 50, that were classified
    correctly; with "sample" it is zero for each sample that is not at this moment. With "onehot" alpha stays, but the
    rows of S start as the one-hot labels, and a sample that is not classified correctly counts in them as its label.
    """

    def __init__(self, task: Task, gate: str = "class", **config: Any) -> None:
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}; got {gate!r}")
        super().__init__(task, **{"smoothing": "class_mean"} | config)
        self.criterion.labels.means = GATES[gate](task.num_classes)


class MeansOfKnownClasses(nn.Module, ClassMeans):
    """Class means that share each target with its label, in proportion to how much of the class is known.

    It is a module, so that what it knows is saved with the arm.
    """

    known: Tensor

    def __init__(self, classes: int) -> None:
        nn.Module.__init__(self)
        ClassMeans.__init__(self)
        self.register_buffer("known", torch.zeros(classes))

    def recall(self, batch: Batch) -> Tensor:
        return onehot(batch).lerp(super().recall(batch), self.known[batch.labels][:, None])

    def observe(self, batch: Batch) -> None:
        super().observe(batch)
        counts = batch.labels.bincount(minlength=len(self.known))
        correct = batch.labels.bincount(is_correct(batch).float(), minlength=len(self.known))
        self.known = self.known.lerp(correct / counts.clamp_min(1), 1 - MEMORY**counts)


class MeansOfKnownSamples(ClassMeans):
    """Class means for the samples that are classified correctly, and the label itself for all others."""

    def recall(self, batch: Batch) -> Tensor:
        return torch.where(is_correct(batch)[:, None], super().recall(batch), onehot(batch))


class OneHotOfUnknown(ClassMeans):
    """Class means that begin with the one-hot labels, and count a sample that is not known as its label."""

    def beginning(self, classes: int, like: Tensor) -> dict[str, Tensor]:
        return super().beginning(classes, like) | {"distributions": torch.eye(classes).to(like)}

    def observe(self, batch: Batch) -> None:
        counted = torch.where(is_correct(batch)[:, None], batch.log_probabilities, onehot(batch).log())
        super().observe(batch._replace(log_probabilities=counted))


GATES: dict[str, Callable[[int], ClassMeans]] = {
    "class": MeansOfKnownClasses,
    "sample": lambda _: MeansOfKnownSamples(),
    "onehot": lambda _: OneHotOfUnknown(),
}


def is_correct(batch: Batch) -> Tensor:
    """Return which samples are classified correctly at this moment, (N,)."""
    return batch.log_probabilities.argmax(dim=1) == batch.labels


def onehot(batch: Batch) -> Tensor:
    """Return the labels as distributions, (N, K)."""
    return F.one_hot(batch.labels, batch.log_probabilities.shape[1]).to(batch.log_probabilities)
