"""sfr itself: the wrapper and its criterion, used as a user does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import sfr
from benchmarks.accuracy.methods.arm import Arm, Task
from sfr.config import Preset


class SelfFeature(Arm):
    """Self-feature regularization; options are fields of :class:`sfr.SFRConfig`, also under the names of before 0.2.

    Committed cells are named by those: `weight`, `warmup`, and `alpha_end`, to which alpha moves over the whole run
    unless `alpha_steps` is given. `stages` is the wrapper's, `supervisor` the criterion's, `preset` the purpose of one.
    """

    model: sfr.SFRWrapper

    def __init__(
        self,
        task: Task,
        stages: str | None = None,
        supervisor: nn.Module | None = None,
        preset: Preset | None = None,
        **config: Any,
    ) -> None:
        super().__init__(task)
        samples, steps = len(task.labels), task.epochs * task.epoch_steps
        if config.get("smoothing") == "past":
            config["num_samples"] = samples
        if "alpha_end" in config:
            config = {"alpha_steps": steps} | config
        if preset:
            config = sfr.SFRConfig.preset(preset, num_samples=samples, steps=steps, **config).to_dict()
        self.model = sfr.SFRWrapper(task.model, stages=stages)
        self.criterion = sfr.SFRLoss(self.model, config, supervisor=supervisor)

    def forward(self, indices: Tensor) -> Tensor:
        return self.criterion(self.model(self.task.images(indices)), self.task.labels[indices], index=indices)

    def end_epoch(self) -> None:
        self.criterion.end_epoch()

    def settings(self) -> dict[str, Any]:
        return self.criterion.config.to_dict()
