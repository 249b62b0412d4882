"""Any feature layout -> nodes: the local feature vectors (B, N, C) of one map, and their channel segments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr.config import Grouping, Layout
from sfr.pca import Moments

Grid = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """How the output of a stage is read.

    Args:
        layout: its memory layout.
        prefix: tokens in front that are no local features (class, distillation, register tokens); they are dropped.
        grid: shape of a map with the proportions of the one the tokens come from; () for a plain sequence.
    """

    layout: Layout
    prefix: int = 0
    grid: Grid = ()


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
        ValueError: if the feature has not the number of axes that its layout needs, or the layout is no such.
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
            raise ValueError(f"has {feature.shape[1]} tokens, of which prefix_tokens={view.prefix} leave none")
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


def common_grids(shallow: Grid, deep: Grid, max_grid: int) -> tuple[Grid, Grid]:
    """Return the grids to pool a pair of maps to: at most `max_grid` cells an axis, and no map is ever enlarged.

    A token sequence counts as one axis of at most ``max_grid**2`` cells. Where the two maps have the same number of
    axes, the shallow one takes the grid of the deep one as far as it is large enough.

    Example:
        >>> common_grids((32, 32), (4, 4), max_grid=8)
        ((4, 4), (4, 4))
    """
    deep_grid = _limited(deep, max_grid)
    if len(shallow) == len(deep):
        return tuple(map(min, shallow, deep_grid)), deep_grid
    return _limited(shallow, max_grid), deep_grid


def _limited(shape: Grid, max_grid: int) -> Grid:
    limit = max_grid**2 if len(shape) == 1 else max_grid
    return tuple(min(size, limit) for size in shape)


def to_nodes(feature_map: Tensor, grid: Grid) -> Tensor:
    """Average-pool a feature map to `grid` and return its cells as nodes.

    Args:
        feature_map: shape (B, C, *spatial), or (B, C) of a vector, which is one node; see :func:`as_map`.
        grid: cells along each spatial axis, none larger than the map's own.

    Returns:
        Nodes of shape (B, N, C) with N the number of cells, in float32 (float64 stays).
    """
    if tuple(feature_map.shape[2:]) != grid:
        feature_map = _pool(feature_map, grid)
    nodes = feature_map.flatten(2).transpose(1, 2) if grid else feature_map.unsqueeze(1)
    return nodes if nodes.dtype == torch.float64 else nodes.float()


def _pool(feature: Tensor, grid: Grid) -> Tensor:
    pools: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    return pools[len(grid) - 1](feature, grid)


def channel_segments(nodes: Tensor, channels: int) -> Tensor:
    """Cut the channels of nodes into segments of `channels` consecutive ones (many-to-one; our reading).

    ``G = C // channels`` segments, at least one. Where C is no multiple of `channels` the channels are first
    average-pooled to ``G * channels``.

    Args:
        nodes: local features, shape (B, N, C).
        channels: channels per segment, 1 <= channels <= C.

    Returns:
        Segments of shape (B, G, N, channels).

    Raises:
        ValueError: if `channels` is not in [1, C].

    Example:
        >>> channel_segments(torch.zeros(2, 5, 64), 16).shape
        torch.Size([2, 4, 5, 16])
    """
    batch, count, width = nodes.shape
    if not 1 <= channels <= width:
        raise ValueError(f"channels must lie in [1, {width}], the channels of the nodes; got {channels}")
    groups = width // channels
    if groups * channels != width:
        nodes = F.adaptive_avg_pool1d(nodes, groups * channels)
    return nodes.reshape(batch, count, groups, channels).transpose(1, 2)


def match_channels(shallow: Tensor, deep: Tensor, grouping: Grouping, *, sync: bool = True) -> tuple[Tensor, Tensor]:
    """Bring a pair of nodes to the same number of channels without any parameter.

    The deep nodes are cut into G segments as wide as the shallow ones (:func:`channel_segments`). Where the deep map
    is the narrower one, the shallow nodes are cut and averaged instead, and G = 1.

    Args:
        shallow: nodes of shape (B, N, C).
        deep: nodes of shape (B, M, D).
        grouping: "segments": one problem per segment; "mean": one, against the mean of the segments; "crop": one, of
            the first min(C, D) channels of both; "svd": one, against :func:`principal_channels` of the deep nodes.
        sync: for "svd", the directions are those of the nodes of all ranks, each of which then has to call.

    Returns:
        Nodes (B * G, N, min(C, D)) and (B * G, M, min(C, D)), the G problems of an image next to each other.
    """
    width = min(shallow.shape[2], deep.shape[2])
    if grouping == "crop":
        return shallow[:, :, :width], deep[:, :, :width]
    if width < shallow.shape[2]:
        shallow = channel_segments(shallow, width).mean(dim=1)
    if grouping == "svd":
        return shallow, principal_channels(deep, width, sync=sync)
    segments = channel_segments(deep, width)
    if grouping == "mean":
        return shallow, segments.mean(dim=1)
    groups = segments.shape[1]
    return shallow.repeat_interleave(groups, dim=0), segments.flatten(0, 1)


def principal_channels(nodes: Tensor, channels: int, *, sync: bool = True) -> Tensor:
    r"""Project nodes on the `channels` directions of their largest variance, as KDEP's aligner does (our reading).

    The directions, those of the nodes of this batch, are orthonormal and get no gradient. No projection to as few
    channels keeps more of the squared distances between the nodes. Two things differ from
    :class:`sfr.pretrain.KDEPLoss`, whose teacher is frozen. Axes of a batch change sign and order from step to step,
    so they are turned within their span to lie nearest the mean of the segments (orthogonal Procrustes problem).
    And the mean is left in, because the shallow side, after a ReLU, could not follow centred features.

    Args:
        nodes: local features, shape (B, N, C).
        channels: 1 <= channels <= C; where it is C the nodes come back as they are, up to rounding.
        sync: take the nodes of all ranks of ``torch.distributed`` for the batch (C x C numbers).

    Returns:
        Nodes of shape (B, N, channels).

    Reference:
        Projection: He et al., CVPR 2022, arXiv 2203.05180. Procrustes: Schönemann, Psychometrika 31, 1966.
    """
    if not len(nodes):
        return nodes[:, :, :channels]
    moments = Moments()
    moments.update(nodes.flatten(0, 1))
    _, axes = (moments.of_all_ranks() if sync else moments).principal_axes()
    span = axes[:, :channels]
    mean_of_segments = channel_segments(torch.eye(len(axes)).to(span)[None], channels).mean(dim=1)[0]
    left, _, right = torch.linalg.svd(span.T @ mean_of_segments)
    with torch.autocast(nodes.device.type, enabled=False):
        return nodes @ (span @ left @ right).to(nodes.dtype)


def cells(grid: Grid) -> int:
    """Return the number of nodes of a grid; a vector is one node."""
    return math.prod(grid)
