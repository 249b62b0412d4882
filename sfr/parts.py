"""LossParts: the parts of one training loss, for a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfr.feature.term import Term


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
    def of(cls, label: Tensor, weight: float, terms: Mapping[str, Term], feature: Tensor | None = None) -> LossParts:
        """Return the parts of a loss with these terms and their mean; None where there is no feature term."""
        pairs = {name: term.value.detach() for name, term in terms.items()}
        distances = {name: term.distance for name, term in terms.items()}
        if feature is None:
            # A copy, because loops that accumulate gradients divide the loss in place.
            label = label.detach().clone()
            return cls(label, torch.zeros_like(label), weight)
        return cls(label.detach(), feature.detach(), weight, pairs, distances)

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
