"""sfr itself: the wrapper and its criterion, used as a user does."""

from typing import Any

from torch import Tensor

import sfr
from baselines.arm import Arm, Task


class SelfFeature(Arm):
    """Self-feature regularization; options are fields of :class:`sfr.SFRConfig`."""

    model: sfr.SFRWrapper

    def __init__(self, task: Task, **config: Any) -> None:
        super().__init__(task)
        self.model = sfr.SFRWrapper(task.model, **config)
        self.criterion = sfr.SFRLoss(self.model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(logits, labels)

    def end_epoch(self) -> None:
        if self.model.sfr_config.update == "epoch":
            self.criterion.end_epoch()

    def settings(self) -> dict[str, Any]:
        return self.model.sfr_config.to_dict()
