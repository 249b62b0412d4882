"""sfr itself: the wrapper and its criterion, used as a user does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import sfr
from benchmarks.accuracy.methods.arm import Arm, Task


class SelfFeature(Arm):
    """Self-feature regularization; options are fields of :class:`sfr.SFRConfig`.

    Alpha moves to `alpha_end` over the whole run unless `alpha_steps` is given.
    """

    model: sfr.SFRWrapper

    def __init__(self, task: Task, **config: Any) -> None:
        super().__init__(task)
        if config.get("smoothing") == "past":
            config["num_samples"] = len(task.labels)
        if "alpha_end" in config:
            config = {"alpha_steps": task.epochs * task.epoch_steps} | config
        self.model = sfr.SFRWrapper(task.model, **config)
        self.criterion = sfr.SFRLoss(self.model)

    def forward(self, indices: Tensor) -> Tensor:
        return self.criterion(self.model(self.task.images(indices)), self.task.labels[indices], index=indices)

    def end_epoch(self) -> None:
        if self.model.sfr.config.update == "epoch":
            self.criterion.end_epoch()

    def settings(self) -> dict[str, Any]:
        return self.model.sfr.config.to_dict()
