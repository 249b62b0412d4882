"""SFRTask for timm's training script."""

from __future__ import annotations

from typing import Any

from timm.task import ClassificationTask
from torch import Tensor, nn

from sfr.criterion import SFRLoss


class SFRTask(ClassificationTask):
    """timm's ``ClassificationTask`` with the feature term; its checkpoints also hold the criterion's state.

    Needs timm 1.0.31 or newer. The result of a training step also has "label" and "feature", the parts of the loss.

    Args:
        model: the wrapped model, :class:`sfr.SFRWrapper`.
        criterion: the criterion; default ``SFRLoss(model)``.
        **options: further arguments of ``ClassificationTask``.

    Example:
        >>> import sfr, timm
        >>> from sfr.integrations.timm import SFRTask
        >>> task = SFRTask(sfr.SFRWrapper(timm.create_model("resnet18")), verbose=False)
    """

    criterion: SFRLoss

    def __init__(self, model: nn.Module, criterion: SFRLoss | None = None, **options: Any) -> None:
        criterion = SFRLoss(model) if criterion is None else criterion
        if not isinstance(criterion, SFRLoss):
            raise TypeError(f"criterion must be an sfr.SFRLoss; got {type(criterion).__name__}")
        super().__init__(model, criterion, **options)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss, the output, and the parts of the loss."""
        result: dict[str, Tensor] = super().forward(input, target)
        if self.criterion.step:
            result |= {"label": self.criterion.last.label, "feature": self.criterion.last.feature}
        return result

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the criterion's state for the checkpoint; the averaged model (EMA) has none."""
        return {} if ema else {"criterion": self.criterion.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore the criterion's state; a checkpoint made without sfr has none."""
        if state and "criterion" in state and not ema:
            self.criterion.load_state_dict(state["criterion"], strict=strict)
