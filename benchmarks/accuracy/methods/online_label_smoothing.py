"""Online label smoothing (Zhang et al., arXiv 2011.12562)."""

from torch import Tensor

import sfr
from benchmarks.accuracy.methods.arm import Arm, Task


class OnlineLabelSmoothing(Arm):
    """Cross-entropy against (1 - alpha) onehot + alpha S[y], S[y] the mean prediction for class y last epoch.

    Only correctly classified images count. Alpha is the paper's, who give it to the one-hot label; at a half that is
    the same. Until a class has been classified correctly its S is uniform; the authors' code has no soft term in the
    first epoch instead.
    """

    def __init__(self, task: Task, alpha: float = 0.5) -> None:
        super().__init__(task)
        self.criterion = sfr.DynamicLabelSmoothing(alpha=alpha, update="epoch")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(logits, labels)

    def end_epoch(self) -> None:
        self.criterion.end_epoch()
