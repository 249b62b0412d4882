"""What all arms of the comparison have in common: an arm turns the numbers of some training images into a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OWN_DRAWS = 30_000  # added to the seed of the run


@dataclass(frozen=True)
class Task:
    """What an arm is given.

    Args:
        model: the untrained classifier, images (B, 3, H, W) -> logits (B, K).
        images: returns the augmented images (B, 3, H, W) of the training images numbered (B,), anew at each call.
        labels: class indices of all training images, (N,), on the device of the model.
        num_classes: K.
        epochs: epochs of the whole run.
        epoch_steps: steps of one epoch.
    """

    model: nn.Module
    images: Callable[[Tensor], Tensor]
    labels: Tensor
    num_classes: int
    epochs: int
    epoch_steps: int


class Arm(nn.Module):
    """Vanilla training, and the base of all other arms: plain cross-entropy.

    Most arms override :meth:`loss`, those that need more than one forward of one batch :meth:`forward`. Parameters and
    buffers of an arm are trained and saved with the model's; at the end the model is judged without them.
    """

    epochs_factor: float = 1.0  # epochs of this arm to those of the schedule

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.model = task.model

    def forward(self, indices: Tensor) -> Tensor:
        """Return the loss, 0-d, of one step on the training images numbered `indices`, (B,)."""
        return self.loss(self.model(self.task.images(indices)), self.task.labels[indices])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, 0-d, of logits (B, K) and labels (B,)."""
        return F.cross_entropy(logits, labels)

    def end_epoch(self) -> None:
        """Do whatever the method does between two epochs."""

    def settings(self) -> dict[str, Any]:
        """Return what the arm's name alone does not say for ever: the values of defaults that may change."""
        return {}


class Draws(nn.Module):
    """A generator on the CPU for what an arm alone draws; part of an arm, it is saved with it.

    What all arms draw, initial weights and the order of the images, stays the same for the same seed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(OWN_DRAWS + torch.initial_seed())

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || prediction), 0-d, of logits (B, K) over the temperature; the teacher gets no gradient."""
    predicted = F.log_softmax(logits.float() / temperature, dim=1)
    target = F.softmax(teacher.detach().float() / temperature, dim=1)
    return F.kl_div(predicted, target, reduction="batchmean")
