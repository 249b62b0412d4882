"""Principal components of vectors that arrive in batches: one pass, D² memory, the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Count, mean and scatter of the vectors seen so far, in float64.

    Batches are merged by the update of Chan, Golub & LeVeque (1979), which, unlike sums of squares, loses no digits
    where the mean is large against the spread.

    Attributes:
        count: number of vectors.
        mean: their mean, shape (D,).
        scatter: sum of the outer products of their deviations from the mean, shape (D, D).

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.mean.tolist(), moments.scatter.diagonal().tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.empty(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Take in vectors of shape (B, D); an empty batch changes nothing."""
        if not len(vectors):
            return
        vectors = vectors.double()
        mean = vectors.mean(dim=0)
        deviations = vectors - mean
        scatter = deviations.T @ deviations
        if not self.count:
            self.count, self.mean, self.scatter = len(vectors), mean, scatter
            return
        count = self.count + len(vectors)
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * len(vectors) / count)
        self.mean = self.mean + shift * (len(vectors) / count)
        self.count = count

    @torch.no_grad()
    def of_all_ranks(self) -> Moments:
        """Return the moments over all ranks, each of which must have seen vectors; without ranks, these."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        dist.all_reduce(sums)
        total = Moments()
        total.count, total.mean = round(sums[-1].item()), sums[:-1] / sums[-1]
        shift = self.mean - total.mean
        total.scatter = self.scatter + torch.outer(shift, shift) * self.count
        dist.all_reduce(total.scatter)
        return total

    def principal_axes(self) -> tuple[Tensor, Tensor]:
        """Return singular values (D,), largest first, and right singular vectors (D, D), one per column.

        They belong to the matrix of deviations. The component of largest magnitude of an axis is positive.
        """
        squares, axes = torch.linalg.eigh(self.scatter)
        squares, axes = squares.flip(0), axes.flip(1)
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        return squares.clamp_min(0).sqrt(), torch.where(largest < 0, -axes, axes)
