"""Early-learning regularization (Liu et al., NeurIPS 2020, arXiv 2007.00151), against the learning of wrong labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task

LEAST = 1e-4  # of a probability, as the authors' code has it


class EarlyLearning(Arm):
    """Cross-entropy + weight * mean(log(1 - <t, p>)), t the running mean of what the network said of the image.

    The targets t start at zero; before the loss each takes the prediction p in by t <- beta t + (1 - beta) p. Weight
    and beta are the authors' for CIFAR-10 and CIFAR-100.

    Differs from the authors' training, not from their loss: learning rate, its schedule and weight decay are those of
    all arms. Theirs start again every ten epochs, from 0.02 with weight decay 1e-3.
    """

    targets: Tensor

    def __init__(self, task: Task, weight: float | None = None, beta: float | None = None) -> None:
        super().__init__(task)
        few = task.num_classes <= 10
        self.weight = weight if weight is not None else (3.0 if few else 7.0)
        self.beta = beta if beta is not None else (0.7 if few else 0.9)
        self.register_buffer("targets", torch.zeros(len(task.labels), task.num_classes, device=task.labels.device))

    def forward(self, indices: Tensor) -> Tensor:
        logits = self.model(self.task.images(indices)).float()
        predicted = logits.softmax(dim=1).clamp(LEAST, 1 - LEAST)
        newest = F.normalize(predicted.detach(), p=1, dim=1)
        targets = self.targets[indices].lerp(newest, 1 - self.beta)
        self.targets[indices] = targets
        agreement = (targets * predicted).sum(dim=1)
        return self.loss(logits, self.task.labels[indices]) + self.weight * (1 - agreement).log().mean()

    def settings(self) -> dict[str, float]:
        return {"weight": self.weight, "beta": self.beta}
