"""CutMix (Yun et al., ICCV 2019, arXiv 1905.04899), alone and with sfr."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Draws, Task
from benchmarks.accuracy.methods.self_feature import SelfFeature

PROBABILITY = 0.5  # of a batch being mixed: the authors' for CIFAR


class CutMix(Arm):
    """Cross-entropy of images with a patch from another, whose labels are mixed in proportion to the area."""

    def __init__(self, task: Task, probability: float = PROBABILITY) -> None:
        super().__init__(task)
        self.probability, self.draws = probability, Draws()

    def forward(self, indices: Tensor) -> Tensor:
        images, targets = mixed_batch(self.task, indices, self.probability, self.draws.generator)
        return self.loss(self.model(images), targets)


class SelfFeatureCutMix(SelfFeature):
    """Self-feature regularization of such images; options are fields of :class:`sfr.SFRConfig`."""

    def __init__(self, task: Task, probability: float = PROBABILITY, **config: Any) -> None:
        super().__init__(task, **config)
        self.probability, self.draws = probability, Draws()

    def forward(self, indices: Tensor) -> Tensor:
        images, targets = mixed_batch(self.task, indices, self.probability, self.draws.generator)
        return self.criterion(self.model(images), targets)


def mixed_batch(task: Task, indices: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the augmented images (B, 3, H, W) numbered `indices`, with some probability mixed, and targets (B, K)."""
    images = task.images(indices)
    targets = F.one_hot(task.labels[indices], task.num_classes).float()
    if torch.rand((), generator=generator) >= probability:
        return images, targets
    others = torch.randperm(len(indices), generator=generator).to(images.device)
    top, bottom, left, right = random_box(images.shape[2], images.shape[3], generator)
    images[:, :, top:bottom, left:right] = images[others, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return images, (1 - share) * targets + share * targets[others]


def random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of a patch of the image's proportions.

    Its area is uniform, Beta(1, 1), in the image's; its centre anywhere in it; what sticks out is cut off.
    """
    scale = torch.rand((), generator=generator).sqrt().item()
    sides = []
    for size in (height, width):
        half = int(size * scale) // 2
        centre = int(torch.randint(size, (), generator=generator))
        sides += [max(centre - half, 0), min(centre + half, size)]
    top, bottom, left, right = sides
    return top, bottom, left, right
