"""Gain against training time, as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from PIL import Image

from benchmarks.common.paired import standard_error

SHOWS = "Description"  # of the texts in a PNG the one that holds the points
NAME_HEIGHT = 0.06  # of a name, to the range of all gains


class Point(NamedTuple):
    """One arm."""

    name: str
    time: float  # relative to vanilla's
    gains: Sequence[float]  # over vanilla, in points, one a seed
    ours: bool


def draw(panels: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Plot one panel for each title, below each other, with the standard error of the gains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(len(panels), figsize=(7, 4.5 * len(panels)), squeeze=False, layout="constrained")
    for (title, points), axes in zip(panels.items(), grid.flat, strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        for point, height in zip(points, heights([mean(point.gains) for point in points]), strict=True):
            place = point.time, mean(point.gains)
            colour = "tab:red" if point.ours else "tab:blue"
            axes.errorbar(*place, yerr=standard_error(point.gains), fmt="o", color=colour, capsize=3)
            axes.annotate(
                point.name,
                place,
                (10, height),
                textcoords=("offset points", "data"),
                fontsize=8,
                verticalalignment="center",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
            )
        axes.set(xlabel="training time, relative to vanilla", ylabel="gain over vanilla, points")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(x=0.25, y=0.15)  # room for the names
    figure.savefig(path, dpi=110, metadata={"Software": None, SHOWS: shown(panels)})
    plt.close(figure)


def is_drawn(panels: Mapping[str, Sequence[Point]], path: Path) -> bool:
    """Whether a file is the plot of these points, as it says itself: no two versions of matplotlib draw the same."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(SHOWS) == shown(panels)


def shown(panels: Mapping[str, Sequence[Point]]) -> str:
    """Return the points as text."""
    return json.dumps({title: [point._asdict() for point in points] for title, points in panels.items()})


def heights(gains: Sequence[float]) -> list[float]:
    """Return where the names of points go: at their gains, moved up until each is clear of the one below."""
    clearance = NAME_HEIGHT * (max([0.0, *gains]) - min([0.0, *gains]))
    found: dict[int, float] = {}
    below = float("-inf")
    for index in sorted(range(len(gains)), key=gains.__getitem__):
        below = found[index] = max(gains[index], below + clearance)
    return [found[index] for index in range(len(gains))]
