"""What the feature term is of and gives: pairs of stages and their values, image by image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """The two sides of one pair of stages, ready for the transport.

    Attributes:
        shallow: name of the shallow stage.
        deep: name of the deep stage.
        nodes: nodes of the two, (B * G, N, C) and (B * G, M, C), with G problems an image
            (:func:`sfr.feature.channels.match_channels`).
        finite: which images have finite features on both sides, (B,); the nodes of others are zero.
    """

    shallow: str
    deep: str
    nodes: tuple[Tensor, Tensor]
    finite: Tensor

    @property
    def name(self) -> str:
        """ "shallow <- deep"."""
        return pair_name(self.shallow, self.deep)


def pair_name(shallow: str, deep: str) -> str:
    """Return the name of a pair of stages."""
    return f"{shallow} <- {deep}"


class Term(NamedTuple):
    """The feature term of one pair.

    Attributes:
        values: the term of each image, (B,); 0 where the features are not finite.
        distance: how far apart the two sides are, 0-d, without gradient: the term or, with "sqeuclidean", the term over
            the sum of the mean squares of both sides.
        finite: which images have finite features, (B,).
    """

    values: Tensor
    distance: Tensor
    finite: Tensor

    @property
    def value(self) -> Tensor:
        """The mean over the images, 0-d."""
        return self.values.mean()


class Terms(Mapping[str, Term]):
    """The feature terms of all pairs, by "shallow <- deep".

    Args:
        names: names of the P pairs.
        by_image: the term of each pair and image, (P, B).
        finite: which images have finite features in both stages of a pair, (P, B).
        distances: distance of each pair, (P,), if it is not the mean over the images.
    """

    def __init__(self, names: Sequence[str], by_image: Tensor, finite: Tensor, distances: Tensor | None = None) -> None:
        self.names, self.by_image, self.finite, self._distances = tuple(names), by_image, finite, distances

    def __getitem__(self, name: str) -> Term:
        pair = dict(zip(self.names, range(len(self)), strict=True))[name]
        return Term(self.by_image[pair], self.distances[pair], self.finite[pair])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def distances(self) -> Tensor:
        """How far apart the two sides of each pair are, (P,), without gradient."""
        return self.by_image.detach().mean(dim=1) if self._distances is None else self._distances

    def weighted(self, weights: Tensor | None) -> Tensor:
        """Return the terms of the images, each times the weight (B,) of its image as it stands, no share, (P, B)."""
        return self.by_image if weights is None else self.by_image * weights.to(self.by_image)

    def detached(self) -> Terms:
        """Return the terms without their autograd graph."""
        return Terms(self.names, self.by_image.detach(), self.finite, self._distances)


NONE = Terms([], torch.empty(0, 0), torch.empty(0, 0, dtype=torch.bool))
