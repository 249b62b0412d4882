"""SFRCallback for Lightning."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from sfr.criterion import SFRLoss


class SFRCallback(Callback):
    """Logs the parts of the loss, ends its epochs, and keeps the criterion's state in the checkpoints.

    If the criterion is a submodule of the LightningModule, Lightning saves its state anyway; the callback then only
    logs.

    Args:
        criterion: the criterion; None takes the attribute ``criterion`` of the module that is being trained.
        name: what the names in the log begin with. Callbacks for several criteria need names of their own.

    Example:
        >>> import lightning
        >>> from sfr.integrations.lightning import SFRCallback
        >>> trainer = lightning.Trainer(callbacks=[SFRCallback()], accelerator="cpu", logger=False)
    """

    def __init__(self, criterion: SFRLoss | None = None, name: str = "sfr") -> None:
        self._stated = self.criterion = criterion
        self.name = name
        self._is_submodule = False

    @property
    def state_key(self) -> str:
        """What the callback's state is called in a checkpoint."""
        return type(self).__qualname__ if self.name == "sfr" else self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the criterion."""
        found = getattr(pl_module, "criterion", None) if self._stated is None else self._stated
        if not isinstance(found, SFRLoss):
            raise TypeError(
                f"{type(pl_module).__name__} has no attribute criterion that is an sfr.SFRLoss; pass it: "
                "SFRCallback(criterion)"
            )
        self.criterion = found
        self._is_submodule = any(module is found for module in pl_module.modules())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log label, feature, weight and share, and the similarity of each pair, as often as the Trainer logs."""
        every = getattr(trainer, "log_every_n_steps", 1)
        if self.criterion is not None and self.criterion.step and every and trainer.global_step % every == 0:
            pl_module.log_dict({f"{self.name}/{name}": value for name, value in self.criterion.last.as_dict().items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the class means of the epoch, with ``update="epoch"``."""
        if self.criterion is not None:
            self.criterion.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return the criterion's state, for the checkpoint, unless it is there as a submodule's."""
        return {} if self.criterion is None or self._is_submodule else dict(self.criterion.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the criterion's state."""
        if self.criterion is not None and state_dict:
            self.criterion.load_state_dict(state_dict)
