"""Self-distillation from the last mini-batch (Shen et al., DLB, CVPR 2022, arXiv 2203.16172)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task, divergence


class LastMiniBatch(Arm):
    """Cross-entropy of this batch and, once more, of the last one + alpha * KL(last time || now) of the last one.

    As in the authors' code each batch is seen in two steps, augmented anew, so that a step trains on two batches and
    an epoch sees each image twice; the cross-entropy is the mean over both. Predictions are softened by the
    temperature, the divergence multiplied by its square. The authors' code has no defaults for alpha and temperature;
    these are the values reported by the project.
    """

    def __init__(self, task: Task, temperature: float = 3.0, alpha: float = 1.0) -> None:
        super().__init__(task)
        self.temperature, self.alpha = temperature, alpha
        self.last: tuple[Tensor, Tensor] | None = None  # numbers and logits of the last batch

    def forward(self, indices: Tensor) -> Tensor:
        logits = self.model(self.task.images(indices))
        last, self.last = self.last, (indices, logits.detach())
        if last is None:
            return self.loss(logits, self.task.labels[indices])
        before, taught = last
        again = self.model(self.task.images(before))
        apart = self.temperature**2 * divergence(again, taught, self.temperature)
        labels = self.task.labels[torch.cat([before, indices.to(before)])]
        return self.loss(torch.cat([again, logits]), labels) + self.alpha * apart

    def get_extra_state(self) -> dict[str, Any]:
        return {"last": self.last}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.last = state["last"]
