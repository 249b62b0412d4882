"""sfr with the deep features of a slow moving average of the network as the supervisor: still no teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.methods.arm import Task
from benchmarks.accuracy.methods.self_feature import SelfFeature


class SlowSupervisor(SelfFeature):
    """Self-feature regularization whose deep nodes come from the average over `decay` of the network's weights.

    The average sees the same augmented images, with the batch's own statistics in its normalisations; it follows the
    network after every step, unless not `rising` faster at first (Tarvainen & Valpola, arXiv 1703.01780, whose rule for
    that it is). Other options are fields of :class:`sfr.SFRConfig`. It costs a second forward.
    """

    steps: Tensor

    def __init__(
        self, task: Task, decay: float = 0.99, stages: str | None = None, rising: bool = True, **config: Any
    ) -> None:
        average = copy.deepcopy(task.model).requires_grad_(False)  # before its stages are tapped
        super().__init__(task, stages, supervisor=average, **config)
        self.average, self.decay, self.rising = average, decay, rising
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, indices: Tensor) -> Tensor:
        self._follow()
        return super().forward(indices)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards what the last step has made of the network."""
        decay = torch.clamp((1 + self.steps) / (10 + self.steps), max=self.decay) if self.rising else self.decay
        for average, own in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(own, 1 - float(decay))
        self.steps += 1
