"""Maps -> nodes: the local feature vectors (B, N, C) of one map."""

from __future__ import annotations

import torch
from torch import Tensor

from sfr.feature.pooling import Grid, pool

__all__ = ["Grid", "common_grids", "to_nodes"]


def common_grids(shallow: Grid, deep: Grid, max_grid: int) -> tuple[Grid, Grid]:
    """Return the grids to pool a pair of maps to: at most `max_grid` cells an axis, and no map is ever enlarged.

    A token sequence counts as one axis of at most ``max_grid**2`` cells. If both maps have the same number of axes, the
    shallow map takes the grid of the deep one, or its own size where that is smaller.

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


def to_nodes(feature_map: Tensor, grid: Grid, *, joining: bool = False) -> Tensor:
    """Average-pool a feature map to `grid` and return its cells as nodes.

    Args:
        feature_map: shape (B, C, *spatial), or (B, C) of a vector, which is one node.
        grid: cells along each spatial axis, none larger than the map's own.
        joining: see :func:`sfr.feature.pooling.pool`.

    Returns:
        Nodes of shape (B, N, C) with N the number of cells, in float32 (float64 stays).
    """
    nodes = cells_of(feature_map, grid, joining=joining)
    return nodes if nodes.dtype == torch.float64 else nodes.float()


def cells_of(feature_map: Tensor, grid: Grid, *, joining: bool = False) -> Tensor:
    """Return what :func:`to_nodes` does, in the dtype of the map."""
    if not grid:
        return feature_map.unsqueeze(1)
    if tuple(feature_map.shape[2:]) == grid:
        return feature_map.flatten(2).transpose(1, 2)
    return pool(feature_map, grid, joining=joining).transpose(1, 2)
