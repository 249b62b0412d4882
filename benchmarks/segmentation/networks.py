"""Networks that give every pixel a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

NETWORKS = ("unet", "lraspp")


def build_network(name: str, num_classes: int) -> nn.Module:
    """Return a network with random weights: "unet", or torchvision's LR-ASPP on MobileNetV3-large, "lraspp"."""
    if name == "unet":
        return UNet(num_classes)
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) with batch normalisation, whose convolutions keep the size.

    Args:
        num_classes: K.
        width: channels of the first level; each of the next has twice as many.
        levels: sizes that it works at; height and width of an image are multiples of ``2**(levels - 1)``.
    """

    def __init__(self, num_classes: int, width: int = 16, levels: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(map(convolutions, [3, *widths], widths))
        self.up = nn.ModuleList(convolutions(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K, H, W) of images (B, 3, H, W)."""
        x, kept = images, []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, finer in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([finer, nn.functional.interpolate(x, scale_factor=2.0)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def convolutions(inside: int, outside: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inside, outside):
        layers += [nn.Conv2d(width, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)
