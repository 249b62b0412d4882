"""Class-wise self-knowledge distillation (Yun et al., CS-KD, CVPR 2020, arXiv 2003.13964)."""

import torch
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Draws, Task, divergence


class ClassWise(Arm):
    """Cross-entropy of each image + weight * KL(partner || image) at a temperature, times its square.

    The partner is another training image of the class (at times the image itself), drawn anew at each step. As in the
    authors' code it goes through the network in training mode, without gradient, and every image is the one that is
    trained on once an epoch: a step costs a second forward. Temperature and weight are theirs for CIFAR-100.
    """

    def __init__(self, task: Task, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(task)
        self.temperature, self.weight = temperature, weight
        self.draws = Draws()
        self.labels = task.labels.cpu()
        self.by_class = self.labels.argsort(stable=True)
        self.counts = self.labels.bincount(minlength=task.num_classes)
        self.starts = self.counts.cumsum(0) - self.counts

    def forward(self, indices: Tensor) -> Tensor:
        logits = self.model(self.task.images(indices))
        with torch.no_grad():
            partners = self.model(self.task.images(self.partners(indices)))
        apart = self.temperature**2 * divergence(logits, partners, self.temperature)
        return self.loss(logits, self.task.labels[indices]) + self.weight * apart

    def partners(self, indices: Tensor) -> Tensor:
        """Return the number of a random training image of the class of each image, (B,)."""
        classes = self.labels[indices]
        uniform = torch.rand(len(indices), generator=self.draws.generator)
        return self.by_class[self.starts[classes] + (uniform * self.counts[classes]).long()]
