"""Early-learning regularization: the network keeps to what it said of a sample, against learning wrong labels."""

from __future__ import annotations

from torch import Tensor

from sfr.labels.source import Batch

# What 1 - <t, p> counts at least as; beyond it there is nothing to gain, and no gradient.
LEAST = 1e-4


def agreed(means: Tensor, batch: Batch) -> Tensor:
    """Return the mean of log(1 - <t, p>) over the samples whose label counts, 0-d, at most 0; NaN if there is none.

    Args:
        means: t, the running mean of what the network said of each sample, this step included, (B, K); a row sums to 1
            or, of a sample that is new, to less. No gradient goes there.
        batch: has the logarithms of p, (B, K).

    Reference:
        Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020, arXiv 2007.00151,
        whose code keeps each p between 1e-4 and 1 - 1e-4 in the place of our bound of 1 - <t, p>.
    """
    assert batch.kept is not None  # class indices
    logarithms = (1 - (means * batch.log_probabilities.exp()).sum(dim=1)).clamp_min(LEAST).log()
    return logarithms.where(batch.kept, 0.0).sum() / batch.kept.sum()


def share_of_early(classes: int) -> float:
    """Return how far the term counts: in full from ten classes on, and of fewer so that its pull is that of ten.

    A network that says nothing yet, p = 1/K, is pulled towards any chance deviation of t from p by 1 / (K - 1) times
    that. Our reading; the authors have ten classes and more.
    """
    return min(1.0, (classes - 1) / 9)


def slope_of_agreed(means: Tensor, softmax: Tensor) -> Tensor:
    """Return the gradient of log(1 - <t, p>) of each sample with respect to its logits, (B, K), given t and p."""
    agreement = (means * softmax).sum(dim=1, keepdim=True)
    slope = softmax * (agreement - means) / (1 - agreement).clamp_min(LEAST)
    return slope.where(1 - agreement >= LEAST, 0.0)
