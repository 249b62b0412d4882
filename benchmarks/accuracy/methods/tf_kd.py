"""Teacher-free knowledge distillation with a virtual teacher (Yuan et al., CVPR 2020, arXiv 1909.11723)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task

CORRECT = 0.99  # what the virtual teacher gives the true class; the other classes share the rest


class VirtualTeacher(Arm):
    r"""(1 - alpha) * cross-entropy + alpha * KL(teacher || prediction).

    The teacher, a constant for each class, is softmax(u / temperature) of u = 0.99 for the true class and
    0.01 / (K - 1) for each other. The paper softens the prediction as well; the authors' code does not, and it is
    followed here. Alpha and temperature are those of its ResNet-18 on CIFAR-100, where its divergence, the mean over
    B x K entries times 100, is the sum over classes used here.
    """

    def __init__(self, task: Task, alpha: float = 0.1, temperature: float = 20.0) -> None:
        super().__init__(task)
        self.alpha, self.temperature = alpha, temperature

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_predicted = F.log_softmax(logits.float(), dim=1)
        classes = logits.shape[1]
        u = torch.full_like(log_predicted, (1 - CORRECT) / (classes - 1))
        u[torch.arange(len(labels), device=u.device), labels] = CORRECT
        teacher = F.softmax(u / self.temperature, dim=1)
        divergence = F.kl_div(log_predicted, teacher, reduction="batchmean")
        return (1 - self.alpha) * F.nll_loss(log_predicted, labels) + self.alpha * divergence
