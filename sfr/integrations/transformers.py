"""SFRCallback for Hugging Face's Trainer."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sfr.criterion import SFRLoss
from sfr.warn import warn_user

FILE = "sfr_criterion.pt"
RUN = "sfr.run"  # names the run in a checkpoint: in the criterion's file, and in the Trainer's own state


class SFRCallback(TrainerCallback):
    """Logs the parts of the loss, ends its epochs, and keeps the criterion's state in the Trainer's checkpoints.

    The log of each training loss also gets "sfr/label", "sfr/feature", "sfr/share", "sfr/weight" and the similarity of
    each pair, of the last batch of this process. Trackers (TensorBoard and others) see them only if the callback comes
    before theirs, where :meth:`add_to` puts it.

    Args:
        criterion: the criterion that is the Trainer's ``compute_loss_func``.
        resume_from: checkpoint folder to restore the criterion from, if it is neither ``args.resume_from_checkpoint``
            nor the ``checkpoint-...`` folder of the step in ``args.output_dir``. There a state that another run has
            saved is left alone.

    Example:
        >>> import sfr
        >>> from sfr.integrations.transformers import SFRCallback
        >>> def train(model, args, data):
        ...     model = sfr.SFRWrapper(model)
        ...     criterion = sfr.SFRLoss(model)
        ...     trainer = Trainer(model, args, train_dataset=data, compute_loss_func=criterion)
        ...     SFRCallback(criterion).add_to(trainer)
        ...     trainer.train()
    """

    def __init__(self, criterion: SFRLoss, resume_from: str | Path | None = None) -> None:
        self.criterion = criterion
        self.resume_from = resume_from
        self._run = uuid.uuid4().hex  # the Trainer does not tell callbacks which folder it resumes from

    def add_to(self, trainer: Trainer) -> None:
        """Add the callback to a Trainer, before all others."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the parts of the loss to the log of the training loss and to the log history."""
        if logs is None or "loss" not in logs or not self.criterion.step:
            return
        parts = {f"sfr/{name}": value for name, value in self.criterion.last.as_dict().items()}
        logs.update(parts)
        if state.log_history:
            state.log_history[-1].update(parts)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the class means of the epoch, with ``update="epoch"``."""
        self.criterion.end_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the criterion's state into the checkpoint."""
        if state.is_world_process_zero:
            torch.save(self.criterion.state_dict() | {RUN: self._run}, _folder_of(args, state) / FILE)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the criterion's state, if training resumes; warn if the checkpoint has none."""
        if state.global_step:
            self._restore(args, state)
        _runs_in(state)[RUN] = {"args": {}, "attributes": {"run": self._run}}

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        stated = self.resume_from
        folders = [args.resume_from_checkpoint, _folder_of(args, state)] if stated is None else [stated]
        files = [Path(folder) / FILE for folder in folders if isinstance(folder, (str, Path))]
        resumed = _runs_in(state).get(RUN, {}).get("attributes", {}).get("run")
        for file in filter(Path.exists, files):
            saved = torch.load(file, weights_only=True, map_location="cpu")
            if saved.pop(RUN, resumed) == resumed or stated is not None:
                self.criterion.load_state_dict(saved)
                return
        warn_user(
            f"training resumes, but the criterion starts anew, because none of these files exists and is of this run: "
            f"{', '.join(map(str, files))}. If the checkpoint is elsewhere, pass its folder: "
            "SFRCallback(criterion, resume_from=...)"
        )


def _runs_in(state: TrainerState) -> dict[str, Any]:
    """Return the part of a Trainer's state where callbacks may keep what is theirs, by name."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _folder_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
