"""Pictures of what the method does to one image; matplotlib is needed for them, and imported when one is drawn."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfr.config import Stage
from sfr.criterion import SFRLoss
from sfr.feature.emd import in_place_plan, transport_plan
from sfr.feature.nodes import Grid
from sfr.feature.results import Pair
from sfr.feature.term import matched_pairs, sides_present
from sfr.model.outputs import part_with_graph
from sfr.model.record import known_record
from sfr.model.unchanged import buffers_kept, unchanged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Partners that take less than this share of a patch are not drawn.
LEAST_SHARE = 0.2


def plan(
    criterion: SFRLoss,
    images: Tensor,
    pair: tuple[Stage, Stage] = (0, -1),
    *,
    sample: int = 0,
    axes: Axes | None = None,
) -> Axes:
    """Draw which patches of an image the plan of one pair of stages matches.

    An arrow leads from a patch of the deep stage to the patch of the shallow stage that it supervises, a dot marks a
    patch that supervises itself. The stronger the line, the more of the patch goes there. The cells of both maps are
    drawn as if they covered the image evenly.

    The model runs once in training mode with the switches of the criterion; buffers, gradients, modes and random state
    are restored.

    Args:
        criterion: the criterion of the wrapped model.
        images: a batch as the model takes it, shape (B, C, H, W).
        pair: the shallow and the deep stage, each by name or index.
        sample: number of the image in the batch.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes; ``axes.figure`` is the figure.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if `criterion` is not an :class:`sfr.SFRLoss`.
        ValueError: for images of another shape, an unknown stage, a sample that is not in the batch or whose features
            are not finite, or a stage whose output is not a map with two spatial axes.

    Example:
        >>> import sfr
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1),
        ...                     nn.Flatten(), nn.Linear(16, 10))
        >>> criterion = sfr.SFRLoss(sfr.SFRWrapper(net))
        >>> axes = sfr.plot.plan(criterion, torch.rand(2, 3, 16, 16))
        >>> axes.figure.savefig("plan.png")  # doctest: +SKIP
    """
    axes = _new_axes() if axes is None else axes
    if not isinstance(criterion, SFRLoss):
        raise TypeError(f"criterion must be an sfr.SFRLoss; got {type(criterion).__name__}")
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a batch of shape (B, C, H, W); got {got}")
    if not -len(images) <= sample < len(images):
        raise ValueError(f"sample must be the number of one of the {len(images)} images; got {sample}")
    matched, grids = _matched(criterion, images, pair)
    if not matched.finite[sample]:
        raise ValueError(f"image {sample} has features that are not finite, which take no part in the feature term")
    config = criterion.config
    if config.matching == "in_place":
        plans = in_place_plan(matched.nodes[0])
    else:
        plans = transport_plan(*matched.nodes, cost=config.cost, marginals=config.marginals, solver=config.solver)
    shares = plans.unflatten(0, (len(images), -1))[sample].mean(dim=0).cpu()
    axes.imshow(_picture(images[sample]), cmap="gray")
    _draw_matches(axes, shares, grids, images.shape[2:])
    axes.set(title=matched.name, xticks=[], yticks=[])
    return axes


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("sfr.plot draws with matplotlib, which is not installed: pip install matplotlib") from error
    return pyplot.figure(figsize=(4, 4), layout="constrained").subplots()


def _matched(criterion: SFRLoss, images: Tensor, pair: tuple[Stage, Stage]) -> tuple[Pair, tuple[Grid, Grid]]:
    """Return the nodes of both sides of a pair, and the grids that they lie on."""
    config, model = criterion.config, criterion.model
    record = known_record(model)
    with unchanged(model):
        output = model(images)
        arguments = record.recorder.arguments
        features = record.take_features(part_with_graph(output))
    maps = criterion.maps.of(features)
    names = list(maps)
    [((shallow, grid), (deep, deep_grid))] = sides_present(maps, names, [pair], config.max_grid, config.matching)
    for name in (shallow, deep):
        if maps[name].ndim != 4:
            raise ValueError(
                f"stage {name!r} is no map with two spatial axes, which could be drawn over an image: as a map its "
                f"output has shape {tuple(maps[name].shape)}; choose two other stages of {', '.join(names)}"
            )
    with buffers_kept(criterion.supervisor) if criterion.supervisor else nullcontext():
        sides, pairing = criterion.supervised(maps, arguments, order=names, pairs=[(shallow, deep)])
    [matched] = matched_pairs(sides, **config.of_pairs() | pairing)
    return matched, (grid, deep_grid)


def _picture(image: Tensor) -> Any:
    """Return an image (C, H, W) as matplotlib takes it, its values brought to [0, 1]; gray unless C is 3."""
    image = image.detach().float().cpu()
    image = image if len(image) == 3 else image.mean(dim=0, keepdim=True)
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp_min(1e-12)
    return (image.movedim(0, 2) if len(image) == 3 else image[0]).numpy()


def _draw_matches(axes: Axes, plan: Tensor, grids: tuple[Grid, Grid], size: torch.Size) -> None:
    """Draw the cells of both grids and the matches of a plan (N, M) between them over an image of this size."""
    from matplotlib import colormaps

    for grid, style in zip(reversed(grids), ("--", "-"), strict=True):
        for line in range(1, grid[0]):
            axes.axhline(line * size[0] / grid[0] - 0.5, color="white", linewidth=0.8, linestyle=style)
        for line in range(1, grid[1]):
            axes.axvline(line * size[1] / grid[1] - 0.5, color="white", linewidth=0.8, linestyle=style)
    shallow, deep = (_centres(grid, size) for grid in grids)
    shares = plan / plan.sum(dim=1, keepdim=True).clamp_min(1e-12)
    for p, q in (shares >= LEAST_SHARE).nonzero().tolist():
        colour = colormaps["hsv"](q / len(deep))
        (x, y), (from_x, from_y), share = shallow[p], deep[q], float(shares[p, q])
        if (x, y) == (from_x, from_y):
            axes.plot(x, y, "o", color=colour, markersize=7, markeredgecolor="black", alpha=share)
        else:
            arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.15", "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                "", (x, y), (from_x, from_y), arrowprops={**arrow, "color": colour, "linewidth": 2, "alpha": share}
            )


def _centres(grid: Grid, size: torch.Size) -> list[tuple[float, float]]:
    """Return the centre of each cell of a grid over an image, (x, y) in pixels."""
    (rows, columns), (height, width) = grid, size
    return [
        ((column + 0.5) * width / columns - 0.5, (row + 0.5) * height / rows - 0.5)
        for row in range(rows)
        for column in range(columns)
    ]
