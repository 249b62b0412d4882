"""LossParts: the parts of one training loss, for a log."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """The parts of one training loss, ``label + weight * feature``, detached and on their device.

    Args:
        label: the label term, 0-d.
        feature: the feature term before weighting, 0-d; zero where the weight is zero.
        weight: λ of this step.
        pairs: the feature term of each pair, by "shallow <- deep".
        distances: how far apart the two sides of each pair are under its plan: their feature term; with the cost
            "sqeuclidean", the term over the sum of the mean squares of both sides.
    """

    label: Tensor
    feature: Tensor
    weight: float
    pairs: dict[str, Tensor] = field(default_factory=dict)
    distances: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def without_feature(cls, label: Tensor, weight: float) -> LossParts:
        """Return the parts of a loss that has no feature term."""
        # A copy, because loops that accumulate gradients divide the loss in place.
        label = label.detach().clone()
        return cls(label, torch.zeros_like(label), weight)

    @property
    def similarity(self) -> dict[str, Tensor]:
        """How alike the two sides of each pair are, at most 1: 1 means equal nodes, 0 unrelated ones."""
        return {pair: 1 - distance for pair, distance in self.distances.items()}

    @property
    def share(self) -> Tensor:
        """The share of the weighted feature term in the loss, 0-d; 0 for a loss of zero."""
        weighted = self.weight * self.feature
        return (weighted / (self.label.abs() + weighted)).nan_to_num(nan=0.0)

    def as_dict(self) -> dict[str, float]:
        """Return label, feature, weight, share and "similarity shallow <- deep" of each pair for a log.

        It waits for the device.
        """
        parts = {"label": self.label, "feature": self.feature, "share": self.share}
        parts |= {f"similarity {pair}": value for pair, value in self.similarity.items()}
        return {"weight": self.weight} | {name: value.item() for name, value in parts.items()}
