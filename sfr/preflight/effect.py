"""What a feature term will do to a training, in words, from its share in the first loss."""

from __future__ import annotations

import math

from sfr.step_warnings import LARGE_SHARE

# Shares of the feature term in the first loss: between the two it is as it should be.
WEAK_SHARE, STRONG_SHARE = 0.005, 0.1
FITTED = 0.1  # a label term below it is that of labels that are fitted


def effect_of(share: float, label: float, *, own_loss: bool = False) -> str:
    """Return what a feature term of this share in a loss with this label term will do."""
    if not math.isfinite(label):
        return "The label term is not finite: look at the batch, and at the weights of the model."
    if share > STRONG_SHARE and label < FITTED and not own_loss:
        return "The labels are fitted: what is left of the loss is the feature term."
    if share > LARGE_SHARE:
        rest = "your loss" if own_loss else "the labels"
        return f"The feature term outweighs {rest}, which the network may not learn. Lower feature_weight=."
    if share > STRONG_SHARE:
        return "A strong regularizer: compare with plain training, or lower feature_weight=."
    if share > WEAK_SHARE and not own_loss:
        return "A mild regularizer: the labels lead, and the feature term counts more as they are fitted."
    if share > WEAK_SHARE:
        return "A mild regularizer: your loss leads."
    if own_loss:
        return "Next to no effect at first: the weight is zero, the stages are alike, or your loss is much larger."
    return "Next to no effect at first: the weight is zero or the stages are alike, and it grows as they part."
