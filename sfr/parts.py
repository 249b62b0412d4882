"""LossParts: the parts of one training loss, for a log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfr.feature.results import Terms


@dataclass(frozen=True, repr=False)
class LossParts:
    """The parts of one training loss, ``label + weight * feature``, detached and on their device.

    Args:
        label: the label term, 0-d.
        weight: λ of this step.
        terms: the feature terms of the pairs; None if there are none, as where the weight is zero.
        weights: by how much the term of each image counts, (B,); None for 1.
    """

    label: Tensor
    weight: float
    terms: Terms | None = None
    weights: Tensor | None = None

    # What follows is worked out when it is asked for, so that a step that logs nothing pays nothing.

    @cached_property
    def feature(self) -> Tensor:
        """The feature term before weighting, 0-d: the mean over pairs and images; zero if there are no features."""
        if self.terms is None:
            return torch.zeros_like(self.label)
        return self.terms.weighted(self.weights).mean().to(self.label.device)

    @property
    def pairs(self) -> dict[str, Tensor]:
        """The feature term of each pair, by "shallow <- deep"."""
        if self.terms is None:
            return {}
        return dict(zip(self.terms, self.terms.weighted(self.weights).mean(dim=1), strict=True))

    @property
    def distances(self) -> dict[str, Tensor]:
        """How far apart the two sides of each pair are under its plan.

        It is their feature term before the weights of the images; with the cost "sqeuclidean", the term over the sum of
        the mean squares of both sides.
        """
        return {} if self.terms is None else dict(zip(self.terms, self.terms.distances, strict=True))

    @property
    def similarity(self) -> dict[str, Tensor]:
        """How alike the two sides of each pair are, at most 1: 1 means equal nodes, 0 unrelated ones."""
        return {pair: 1 - distance for pair, distance in self.distances.items()}

    @property
    def share(self) -> Tensor:
        """The share of the weighted feature term in the loss, 0-d; 0 for a loss of zero."""
        weighted = self.weight * self.feature
        return (weighted / (self.label.abs() + weighted)).nan_to_num(nan=0.0)

    def __repr__(self) -> str:
        parts = {"label": self.label, "feature": self.feature, "weight": self.weight, "share": self.share}
        return f"LossParts({', '.join(f'{name}={value!r}' for name, value in parts.items())})"

    def as_dict(self) -> dict[str, float]:
        """Return label, feature, weight, share and "similarity shallow <- deep" of each pair for a log.

        It waits for the device.
        """
        parts = {"label": self.label, "feature": self.feature, "share": self.share}
        parts |= {f"similarity {pair}": value for pair, value in self.similarity.items()}
        return {"weight": self.weight} | {name: value.item() for name, value in parts.items()}


def sum_of_parts(label: Tensor, weight: float, values: Tensor) -> Tensor:
    """Return ``label + weight * values.mean()``, 0-d, in one operation, and one back."""
    return torch.add(label, values.sum().to(label.device), alpha=weight / values.numel())
