"""LabelTerm: what the labels ask of the network in one step, by the method's own loss or by one of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfr.config import SFRConfig
from sfr.labels.cross_entropy import cross_entropy
from sfr.labels.fitted import fitted, image_by_image, of_all_images
from sfr.labels.smoothing import DynamicLabelSmoothing
from sfr.labels.targets import check_logits, checked_target
from sfr.model.maps import Maps
from sfr.model.outputs import part_with_graph, the_logits

NO_LOSS = (
    ". A Hugging Face model computes its loss only if it is given the labels, which the Trainer keeps for its "
    "compute_loss_func: there compute the loss from output.logits and the target"
)


@dataclass(frozen=True)
class LabelTerm:
    """The label term of a criterion.

    Args:
        labels: the method's own loss.
        label_loss: takes its place, or None. It is called with the output of the model and the target as they are.
        config: the switches of the criterion.
    """

    labels: DynamicLabelSmoothing
    label_loss: Callable[[Any, Any], Tensor] | None
    config: SFRConfig

    @property
    def exchanges(self) -> bool:
        """Whether a step exchanges something with the other ranks, if there are any."""
        return self.label_loss is None and self.labels.exchanges

    def logits_in(self, output: Any) -> Tensor:
        """Return the logits in the output of the model; for a loss of the user's own, any part of it with a graph."""
        if self.label_loss is not None:
            return part_with_graph(output)
        logits = the_logits(output)
        check_logits(logits)
        return logits

    def of_step(self, output: Any, target: Any, index: Tensor | None, *, again: bool) -> Tensor:
        """Return the label term of a training step, 0-d; `again` if it is one more call of the same step."""
        if self.label_loss is not None:
            return self.plain(output, target)
        if again:
            self.labels.repeat_step()
        return self.labels(the_logits(output), target, index)

    def plain(self, output: Any, target: Any) -> Tensor:
        """Return the loss without the method, 0-d: cross-entropy, or what was given for it.

        Raises:
            TypeError, ValueError: for an output or target of the wrong kind, shape or range, or if the loss of the
                user's own does not return a 0-d tensor.
        """
        if self.label_loss is None:
            logits, ignore_index = the_logits(output), self.config.ignore_index
            return cross_entropy(logits, checked_target(logits, target, ignore_index), ignore_index)
        loss = self.label_loss(output, target)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"label_loss must return a 0-d tensor; got {got}{NO_LOSS if loss is None else ''}")
        return loss

    def gate(self, output: Any, target: Any, images: int, maps: Maps) -> Tensor | None:
        """Return how far the labels of each image are fitted, (B,); None if the feature term counts in full.

        Args:
            output, target: as they were given to the criterion.
            images: how many images the features are of.
            maps: knows what the model has returned.
        """
        if self.config.gate == "none" or self.label_loss is not None:
            return None
        logits = the_logits(output)
        rows = maps.rows(logits.shape, images)
        if rows == "grouped":
            by_position = maps.lie_by_position(images)
            logits, target = image_by_image(logits, target, images, by_position=by_position)
        weights = fitted(logits, target, self.config.ignore_index)
        if rows in ("one each", "grouped"):
            return weights
        return of_all_images(weights, images, folded=rows == "folded")
