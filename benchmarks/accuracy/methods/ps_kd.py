"""Progressive self-knowledge distillation (Kim et al., PS-KD, ICCV 2021, arXiv 2006.12000)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task


class Progressive(Arm):
    """Cross-entropy against (1 - a) onehot + a p, p what the network said of the image in the epoch before.

    In epoch t of T, counted from 1, a is alpha t / T; in the first, p is the one-hot label. Alpha is the paper's for
    CIFAR-100. The predictions are those of training, of the augmented image.
    """

    predictions: Tensor
    epoch: Tensor

    def __init__(self, task: Task, alpha: float = 0.8) -> None:
        super().__init__(task)
        self.alpha = alpha
        self.register_buffer("predictions", self.onehot(task.labels))
        self.register_buffer("epoch", torch.tensor(1))

    def forward(self, indices: Tensor) -> Tensor:
        logits = self.model(self.task.images(indices)).float()
        share = self.alpha * self.epoch / self.task.epochs
        onehot = self.onehot(self.task.labels[indices])
        targets = (1 - share) * onehot + share * self.predictions[indices]
        self.predictions[indices] = logits.detach().softmax(dim=1)
        return self.loss(logits, targets)

    def onehot(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.task.num_classes).float()

    def end_epoch(self) -> None:
        self.epoch += 1
