"""Few labels and wrong labels, drawn the same way in every benchmark."""

from __future__ import annotations

import torch
from torch import Tensor


def few_labels(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the numbers of `per_class` random images of each class, class by class."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])


def with_noise(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return the labels with exactly `share` of them replaced by another class, each other class equally likely."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + shift) % num_classes
    return noisy
