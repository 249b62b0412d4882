"""How far the network fits the labels of each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr.labels.on_a_device import fitted_on_a_device


@torch.no_grad()
def fitted(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the square of the probability that the network gives to the label of each image, shape (B,), in [0, 1].

    The square lets a network that is half sure of its labels go on learning them: with the probability itself a small
    ViT lost 0.7 points, with the square 0.2 (docs/accuracy.md).

    Of an image with many labels (segmentation) it is the mean over those that are not ignored, and 1 if there is none.
    Of a soft target it is that of a label drawn from it, so that two labels of one image, each by itself and weighed,
    count as the mixed target does.

    Args:
        logits: shape (B, K), or (B, K, ...) with one prediction at each position.
        target: class indices, shape (B,) or (B, ...), or soft targets of the shape of the logits.
        ignore_index: class index of labels to be left out.
    """
    found = fitted_on_a_device(logits, target, ignore_index)
    if found is not None:
        return found
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target.ndim == 1:  # in few operations, which on a GPU are what it costs
        return (
            F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction="none")
            .mul(-2)
            .exp()
            .nan_to_num(nan=0.0)
        )
    probabilities = F.softmax(logits, dim=1).square()
    if target.is_floating_point():
        of_label = (probabilities * target.to(probabilities)).sum(dim=1)
        kept = torch.ones_like(of_label, dtype=torch.bool)
    else:
        kept = target != ignore_index
        of_label = probabilities.gather(1, target.long().where(kept, 0)[:, None]).squeeze(1)
    of_label, kept = of_label.nan_to_num(nan=0.0).where(kept, 0.0).reshape(len(kept), -1), kept.reshape(len(kept), -1)
    labels = kept.sum(dim=1)
    return (of_label.sum(dim=1) / labels.clamp_min(1)).where(labels > 0, 1.0)


def image_by_image(logits: Tensor, target: Tensor, images: int, *, by_position: bool) -> tuple[Tensor, Tensor]:
    """Bring predictions that lie in one row each, as of the tokens of several texts, back to the images they are of.

    Args:
        logits: shape (R, K, ...), R a multiple of the number of images.
        target: as in :func:`fitted`.
        images: how many images, or texts, there are, B.
        by_position: whether the rows are those of the first position of all images, then of the second, and so on; else
            one image follows the other.

    Returns:
        Logits (B, K, R / B, ...), and the target likewise.
    """

    def grouped(rows: Tensor) -> Tensor:
        if by_position:
            return rows.unflatten(0, (-1, images)).transpose(0, 1)
        return rows.unflatten(0, (images, -1))

    of_images, target = grouped(logits).movedim(1, 2), grouped(target)
    return of_images, target.movedim(1, 2) if target.ndim == of_images.ndim else target


def of_all_images(weights: Tensor, images: int, *, folded: bool) -> Tensor:
    """Return a weight for each of the images, (B,), from those of fewer or other rows of logits.

    Args:
        weights: shape (R,).
        images: how many images the features are of, B.
        folded: whether each row is of B / R images, as of the frames of a video. Else it is not known which images they
            are of, as where some have a label, and all get the mean weight.
    """
    if folded and len(weights) and images % len(weights) == 0:
        return weights.repeat_interleave(images // len(weights))
    return weights.mean().expand(images)
