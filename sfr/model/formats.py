"""Any feature layout -> a map, channels first and without prefix tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sfr.config import Layout

Grid = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """How the output of a stage is read.

    Args:
        layout: its memory layout.
        prefix: number of tokens in front that are dropped (class, distillation, register tokens).
        grid: shape of a map with the proportions of the one the tokens come from; () for a plain sequence.
    """

    layout: Layout
    prefix: int = 0
    grid: Grid = ()

    @property
    def batch_axis(self) -> int:
        """Which axis of the output is the batch."""
        return int(self.layout == "sequence_first")


class Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...


def spatial_shape(feature: Shaped, layout: Layout) -> Grid:
    """Return the size of each spatial axis of a feature map: () for a vector, (N,) for N tokens.

    Args:
        feature: a stage output.
        layout: "channels_first" (B, C, ...), "channels_last" (B, ..., C), "tokens" (B, N, C), "sequence_first"
            (N, B, C) or "vector" (B, C).

    Raises:
        ValueError: if the layout is unknown, or the feature does not have as many axes as it needs.
    """
    axes = {
        "vector": (2, 2), "tokens": (3, 3), "sequence_first": (3, 3), "channels_first": (3, 5), "channels_last": (3, 5)
    }  # fmt: skip
    if layout not in axes:
        raise ValueError(f"layout must be one of {', '.join(map(repr, axes))}; got {layout!r}")
    low, high = axes[layout]
    if not low <= feature.ndim <= high:
        needed = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"layout {layout!r} needs {needed} axes; got shape {tuple(feature.shape)}")
    if layout == "sequence_first":
        return (feature.shape[0],)
    return tuple(feature.shape[2:] if layout == "channels_first" else feature.shape[1:-1])


def as_map(feature: Tensor, view: View) -> Tensor:
    """Return a stage output as a map: channels first, without prefix tokens, tokens of an image laid out as its map.

    Returns:
        A view of shape (B, C, *spatial), or (B, C) of a vector.

    Raises:
        ValueError: if the output has not as many axes as the layout needs, or no more tokens than prefix tokens.

    Example:
        >>> import torch
        >>> as_map(torch.zeros(2, 197, 192), View("tokens", prefix=1, grid=(14, 14))).shape
        torch.Size([2, 192, 14, 14])
    """
    spatial_shape(feature, view.layout)
    if view.layout in ("vector", "channels_first"):
        return feature
    if view.layout == "sequence_first":
        feature = feature.transpose(0, 1)
    if view.layout != "channels_last":
        count = feature.shape[1] - view.prefix
        if count < 1:
            raise ValueError(f"has {feature.shape[1]} tokens, and prefix_tokens={view.prefix} leaves none")
        feature = feature[:, view.prefix :].unflatten(1, token_grid(count, view.grid))
    return feature.movedim(-1, 1)


def token_grid(count: int, grid: Grid) -> Grid:
    """Return the shape of `count` tokens on a grid of the same proportions, or as one axis if they fit none.

    Example:
        >>> token_grid(49, (14, 14)), token_grid(50, (14, 14)), token_grid(49, ())
        ((7, 7), (50,), (49,))
    """
    if grid:
        scale = (count / cells(grid)) ** (1 / len(grid))
        scaled = tuple(round(size * scale) for size in grid)
        if cells(scaled) == count:
            return scaled
    return (count,)


def cells(grid: Grid) -> int:
    """Return the number of nodes of a grid; a vector is one node."""
    return math.prod(grid)
