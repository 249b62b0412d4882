"""Inter-layer teacher-free feature distillation (Li, Tf-FD, ECCV 2022)."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

import sfr
from benchmarks.accuracy.methods.arm import Arm, Task
from sfr.config import Grouping
from sfr.feature.channels import match_channels
from sfr.feature.nodes import common_grids, to_nodes

WARMUP = 20 / 240  # of the run


class TeacherFreeFeatureDistillation(Arm):
    """Cross-entropy + weight * the mean, over all pairs of stages, of the squared distance of their maps.

    Of a pair the shallow map is average-pooled to the size of the deep one, which is detached. The weight rises
    linearly over the first 20 of 240 epochs. Weight, warm-up and channels are the paper's for CIFAR-100.

    Args:
        task: what to train.
        weight: of the distances.
        grouping: which channels of the deep map supervise: "crop", the first ones, as many as the shallow map has, or
            "segments", all of them, cut into groups as wide as the shallow map.
        max_grid: both maps are pooled to at most so many cells an axis; by default to the size of the deep one.
    """

    model: sfr.SFRWrapper
    step: Tensor

    def __init__(
        self, task: Task, weight: float = 0.005, grouping: Grouping = "crop", max_grid: int | None = None
    ) -> None:
        super().__init__(task)
        self.model = sfr.SFRWrapper(task.model)  # finds and taps the stages
        self.weight, self.grouping, self.max_grid = weight, grouping, max_grid
        self.warmup = max(1, round(WARMUP * task.epochs * task.epoch_steps))
        self.register_buffer("step", torch.tensor(0))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        maps = self.model.sfr.take_features(logits).values()
        distances = [
            distance(shallow, deep.detach(), self.grouping, self.max_grid) for shallow, deep in combinations(maps, 2)
        ]
        self.step += 1
        weight = self.weight * (self.step / self.warmup).clamp(max=1)
        return F.cross_entropy(logits, labels) + weight * torch.stack(distances).mean()


def distance(shallow: Tensor, deep: Tensor, grouping: Grouping, max_grid: int | None) -> Tensor:
    """Return the mean squared distance, 0-d, of maps (B, C, H, W) and (B, D, h, w)."""
    shapes = [tuple(feature.shape[2:]) for feature in (shallow, deep)]
    grids = common_grids(shapes[0], shapes[1], max_grid or max(shapes[1]))
    nodes = [to_nodes(feature, grid) for feature, grid in zip((shallow, deep), grids, strict=True)]
    return F.mse_loss(*match_channels(nodes[0], nodes[1], grouping))
