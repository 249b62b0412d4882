"""Draws docs/method.png: a network, the pairs of its stages, and the plan of one pair over an image.

python docs/draw_method.py    # about half a minute; trains a small network on scikit-learn's digits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sfr

PICTURE = Path(__file__).with_name("method.png")
STAGES = {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)}  # channels, and cells a side
WIDTHS = {"layer1": 1.5, "layer2": 1.1, "layer3": 0.75}
BLUE, RED, GRAY = "#4051b5", "#c0392b", "#555555"


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, size=32, mode="bilinear")
    criterion = trained(images, labels)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    draw_network(left)
    sfr.plot.plan(criterion, images[:8], ("layer1", "layer3"), sample=3, axes=right)
    right.set_title("which patch of layer3 supervises\nwhich patch of layer1: the plan", fontsize=9)
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight")
    print(PICTURE)


def trained(images: Tensor, labels: Tensor) -> sfr.SFRLoss:
    """Return the criterion of a small network after some epochs of training with the two lines."""
    model: Any = Network()
    model = sfr.SFRWrapper(model)
    criterion = sfr.SFRLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(64):
            loss = criterion(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return criterion


class Network(nn.Module):
    """Three stages of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = stage(1, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer3(self.layer2(self.layer1(images))).mean(dim=(2, 3)))
        return logits


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, s in ((inputs, stride), (outputs, 1)):
        layers += [nn.Conv2d(i, outputs, 3, s, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def draw_network(axes: Axes) -> None:
    """Draw the stages from left to right, the label term behind them, and an arrow for each pair."""
    centres = dict(zip(STAGES, (1.2, 3.7, 5.9), strict=True))
    for name, (channels, side) in STAGES.items():
        half, x = WIDTHS[name] / 2, centres[name]
        for sheet in (2, 1, 0):
            corner = (x - half + 0.09 * sheet, -half + 0.09 * sheet)
            axes.add_patch(Rectangle(corner, 2 * half, 2 * half, facecolor="#e8eaf6", edgecolor=BLUE))
        for line in range(1, 4):  # the grid that the map is pooled to
            place = -half + line * half / 2
            axes.plot([x - half, x + half], [place, place], color=BLUE, linewidth=0.5)
            axes.plot([x + place, x + place], [-half, half], color=BLUE, linewidth=0.5)
        axes.text(x, -1.05, f"{name}\n{channels} x {side} x {side}", ha="center", va="top", fontsize=9)
    rights = [-0.1, *(x + WIDTHS[name] / 2 + 0.2 for name, x in centres.items())]
    lefts = [*(x - WIDTHS[name] / 2 for name, x in centres.items()), 7.0]
    for begin, end in zip(rights, lefts, strict=True):
        axes.add_patch(FancyArrowPatch((begin, 0), (end, 0), arrowstyle="-|>", mutation_scale=12, color=GRAY))
    axes.text(-0.15, 0, "image", ha="right", va="center", fontsize=9)
    axes.text(7.05, 0, "label\nterm", ha="left", va="center", fontsize=9)
    for deep, shallow, height in (("layer2", "layer1", 0.3), ("layer3", "layer2", 0.3), ("layer3", "layer1", 0.38)):
        begin_at, end_at = ((centres[name], WIDTHS[name] / 2 + 0.25) for name in (deep, shallow))
        arrow = FancyArrowPatch(begin_at, end_at, arrowstyle="-|>", connectionstyle=f"arc3,rad={height}")
        arrow.set(mutation_scale=14, color=RED, linewidth=1.6)
        axes.add_patch(arrow)
    axes.text(3.5, 2.15, "each deep stage supervises the shallower ones", ha="center", color=RED, fontsize=9)
    axes.text(3.5, -2.2, "loss = label term + 0.25 x feature term", ha="center", fontsize=10, weight="bold")
    axes.set(xlim=(-1.1, 8.0), ylim=(-2.4, 2.5), aspect="equal")
    axes.set_axis_off()


if __name__ == "__main__":
    main()
