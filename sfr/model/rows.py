"""Which images, or texts, the rows of logits are of, as far as shapes tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

Rows: TypeAlias = Literal["one each", "grouped", "folded", "some"]


class Returned(NamedTuple):
    """What a forward has shown of the logits that a model returns.

    Args:
        shape: of the logits.
        images: how many images, or texts, the stages were of.
        inputs: length of the first axis of the input; None if it has none.
    """

    shape: tuple[int, ...]
    images: int
    inputs: int | None = None

    def of(self, images: int) -> tuple[int, ...] | None:
        """Return the shape for another number of images, as far as the batch is concerned; None if none fits."""
        rows, rest = divmod(self.shape[0] * images, self.images)
        if self.has_batch_second():
            return (self.shape[0], images, *self.shape[2:])
        return None if rest else (rows, *self.shape[1:])

    def has_batch_second(self) -> bool | None:
        """Whether the batch is the second axis of the logits; None if their shape does not tell."""
        if len(self.shape) < 3 or (self.shape[0] == self.images) == (self.shape[1] == self.images):
            return None
        return self.shape[1] == self.images


def rows_of(logits: Sequence[int], images: int, returned: Sequence[int] | None, *, lengths: bool = True) -> Rows:
    """Return how the rows of logits belong to the images that the stages are of.

    Args:
        logits: shape of what the criterion was given, (R, K, ...).
        images: how many images there are, B.
        returned: shape of the logits that the model has returned, if known. Logits with other axes than the first or
            last of these come from a head outside the model.
        lengths: whether the axes besides batch and classes are as long as `returned` says.

    Returns:
        "one each"; "grouped": several for each image, as of the tokens of a text, or of all but one (a model of next
        tokens); "folded": one for several, as for the frames of a video; or "some": of a part of the images or tokens,
        as where a batch is partly labelled.
    """
    rows, axes = logits[0], tuple(logits[1:])
    if rows == images:
        return "one each"
    if returned is not None and len(axes) == 1 and len(returned) > 2 and axes[0] in (returned[1], returned[-1]):
        positions = math.prod(returned) // max(1, axes[0])
        whole = rows > images if not lengths else rows in (positions, positions - images)
        return "grouped" if whole and images and rows % images == 0 else "some"
    if returned is not None and axes == tuple(returned[1:]) and rows < returned[0]:
        return "some"
    return "grouped" if rows > images and images and rows % images == 0 else "folded"
