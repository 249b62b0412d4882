"""L2-SP (Li, Grandvalet & Davoine, ICML 2018, arXiv 1802.01483), for fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task


class L2StartingPoint(Arm):
    """Cross-entropy + alpha / 2 |w - w0|^2 of all weights but the last layer's, + beta / 2 |w|^2 of those.

    The authors scan alpha from 0.001 to 0.1, with beta = 0.01; the middle is taken. The weight decay of the schedule,
    which theirs takes the place of, stays: it is a hundredth of these.
    """

    def __init__(self, task: Task, alpha: float = 0.01, beta: float = 0.01) -> None:
        super().__init__(task)
        self.alpha, self.beta = alpha, beta
        *kept, last = [each for each in self.model.modules() if any(True for _ in each.parameters(recurse=False))]
        self.new = list(last.parameters(recurse=False))
        self.kept = [each for module in kept for each in module.parameters(recurse=False)]
        for i, each in enumerate(self.kept):
            self.register_buffer(f"start_{i}", each.detach().clone())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        starts = [self.get_buffer(f"start_{i}") for i in range(len(self.kept))]
        away = torch.stack([(own - start).square().sum() for own, start in zip(self.kept, starts, strict=True)]).sum()
        size = torch.stack([each.square().sum() for each in self.new]).sum()
        return super().loss(logits, labels) + self.alpha / 2 * away + self.beta / 2 * size
