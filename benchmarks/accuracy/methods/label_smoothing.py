"""Label smoothing (Szegedy et al., arXiv 1512.00567)."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.methods.arm import Arm, Task


class LabelSmoothing(Arm):
    """Cross-entropy against (1 - alpha) onehot + alpha / K."""

    def __init__(self, task: Task, alpha: float = 0.1) -> None:
        super().__init__(task)
        self.alpha = alpha

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.alpha)
