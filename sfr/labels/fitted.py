"""How far the network fits the labels of each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
