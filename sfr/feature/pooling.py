"""Average pooling of maps to a few cells, whose gradient joins that of the map in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, ...]

# Up to so many cells a map is pooled by a matrix product, which on the CPU is faster than PyTorch's pooling; where the
# cells of the grid are equal windows of an image's map, from so many on by two sums.
MATRIX_UP_TO, SUMS_FROM = 2**14, 2**10

NO_GRADIENT = (
    "the label term has no gradient for a stage, though the logits come from it: a part of the model stops it, as an "
    "autograd function that returns None. Pass the loss as label_loss=nn.CrossEntropyLoss(), which takes another way"
)


def pool(feature_map: Tensor, grid: Grid, *, joining: bool = False) -> Tensor:
    """Average-pool a map as PyTorch's adaptive pooling does.

    Args:
        feature_map: shape (B, C, *spatial), one to three spatial axes.
        grid: cells along each axis, none larger than the map's own.
        joining: let the gradient of the cells wait for that of the map, and make one tensor of both in one pass. By
            itself PyTorch writes a gradient as large as the map, and adds the two in a second. It needs a loss that has
            another gradient for the map than that of its cells. (``torch.autograd.grad`` for the map *and* what comes
            before it gives the map's without that of the cells; PyTorch takes it before the hooks.)

    Returns:
        The cells, shape (B, C, N).
    """
    spatial = tuple(feature_map.shape[2:])
    by_matrix = feature_map.device.type == "cpu" and feature_map.dtype in (torch.float32, torch.float64)
    if not by_matrix or math.prod(spatial) > MATRIX_UP_TO or not _is_dense(feature_map):
        pools: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
        return pools[len(grid) - 1](feature_map, grid).flatten(2)
    averaging = _averaging(spatial, grid, feature_map.dtype)
    if joining and torch.is_grad_enabled() and feature_map.requires_grad:
        waiting: list[tuple[int, Tensor]] = []
        cells: Tensor = _JoiningPool.apply(feature_map, averaging, waiting)
        feature_map.register_hook(Join(averaging.added, waiting))
        return cells
    return averaging.of(feature_map)


def _is_dense(feature_map: Tensor) -> bool:
    return feature_map.is_contiguous() or _channels_are_last(feature_map)


def _channels_are_last(feature_map: Tensor) -> bool:
    return not feature_map.is_contiguous() and feature_map.movedim(1, -1).is_contiguous()


@dataclass(frozen=True)
class _Averaging:
    """Average pooling of maps of one shape to one grid.

    Args:
        spatial, grid: cells of the map, and of the grid, along each axis.
        matrix: shape (cells of the map, cells of the grid).
        window: height and width of the windows of a large image, if all are equal.
    """

    spatial: Grid
    grid: Grid
    matrix: Tensor
    window: Grid | None

    def of(self, feature_map: Tensor) -> Tensor:
        """Return the cells (B, C, N) of a map."""
        if _channels_are_last(feature_map):
            return torch.matmul(self.matrix.T, feature_map.movedim(1, -1).flatten(1, -2)).transpose(1, 2)
        shape = (*feature_map.shape[:2], math.prod(self.grid))
        if not self.window:
            return (feature_map.reshape(-1, len(self.matrix)) @ self.matrix).view(shape)
        height, width = self.window
        rows = feature_map.reshape(-1, height, self.spatial[1]).sum(dim=1)
        return rows.view(-1, self.grid[1], width).sum(dim=2).mul_(1 / (height * width)).view(shape)

    def spread(self, cells: Tensor) -> Tensor:
        """Return the gradient (B, C, *spatial) of a map, given that of its cells (B, C, N)."""
        return (cells @ self.matrix.T).unflatten(2, self.spatial)

    def added(self, gradient: Tensor, cells: Tensor) -> Tensor:
        """Return the gradient of a map plus that of its cells, a new tensor."""
        if _channels_are_last(gradient):
            rows = gradient.movedim(1, -1)
            matrix = self.matrix.expand(len(rows), *self.matrix.shape)
            joined = torch.baddbmm(rows.flatten(1, -2), matrix, cells.transpose(1, 2))
            return joined.view(rows.shape).movedim(-1, 1)
        if not self.window:
            flat = gradient.reshape(-1, len(self.matrix))
            return torch.addmm(flat, cells.reshape(-1, cells.shape[2]), self.matrix.T).view(gradient.shape)
        height, width = self.window
        rows = cells.reshape(-1, self.grid[1]).repeat_interleave(width, dim=1).mul_(1 / (height * width))
        return torch.add(gradient.reshape(-1, height, self.spatial[1]), rows[:, None, :]).view(gradient.shape)


@lru_cache(maxsize=256)
def _averaging(spatial: Grid, grid: Grid, dtype: torch.dtype) -> _Averaging:
    """Return the pooling, whose windows are those of PyTorch's adaptive pooling."""
    with torch.inference_mode(False), torch.device("cpu"):
        matrix = torch.ones(1, 1, dtype=dtype)
        for size, count in zip(spatial, grid, strict=True):
            axis = torch.zeros(size, count, dtype=dtype)
            for cell in range(count):
                start, end = cell * size // count, -(-(cell + 1) * size // count)
                axis[start:end, cell] = 1 / (end - start)
            matrix = torch.kron(matrix, axis)
    even = not any(size % count for size, count in zip(spatial, grid, strict=True))
    by_sums = even and len(grid) == 2 and math.prod(spatial) >= SUMS_FROM
    window = tuple(size // count for size, count in zip(spatial, grid, strict=True)) if by_sums else None
    return _Averaging(spatial, grid, matrix.contiguous(), window)


class _JoiningPool(torch.autograd.Function):
    """Pooling whose gradient is left in a list, for the hook of the map."""

    @staticmethod
    def forward(ctx: Any, feature_map: Tensor, averaging: _Averaging, waiting: list[tuple[int, Tensor]]) -> Tensor:
        ctx.averaging, ctx.waiting = averaging, waiting
        return averaging.of(feature_map)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            return ctx.averaging.spread(gradient), None, None
        ctx.waiting.append((torch._C._current_graph_task_id(), gradient))
        return None, None, None


class Join:
    """Hook of a map that adds the gradients of its cells, as far as they are of the same backward pass.

    Args:
        added: returns the gradient of the map plus that of its cells, a new tensor.
        waiting: the gradients of cells, each with the number of its backward pass.
    """

    def __init__(self, added: Callable[[Tensor, Any], Tensor], waiting: list[tuple[int, Any]]) -> None:
        self.added, self.waiting = added, waiting

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        task = torch._C._current_graph_task_id()
        cells = [cells for of_task, cells in self.waiting if of_task == task]
        self.waiting.clear()  # what is left from a pass that did not reach the map belongs to no other
        for each in cells:
            if gradient is None:
                raise RuntimeError(NO_GRADIENT)
            gradient = self.added(gradient, each)
        return gradient
