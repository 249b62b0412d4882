"""Images in memory, cut, flipped and normalised a whole batch at a time, on whatever device they lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.common.data import SOURCES
from examples.common.data import IMAGE_SIZE

POLICY_GROUP = 8  # images that share one draw of AutoAugment


def resized(pixels: Tensor, size: int) -> Tensor:
    """Return uint8 images (N, 3, S, S) averaged down to (N, 3, size, size)."""
    if size == pixels.shape[-1]:
        return pixels
    parts = [F.adaptive_avg_pool2d(part.float(), size).round().byte() for part in pixels.split(4096)]
    return torch.cat(parts)


class Batches:
    """Batches of some uint8 images (N, 3, S, S): normalised, channels last in memory.

    Args:
        pixels: the images; batches come on their device.
        dataset: the name under which mean, deviation and admissible augmentation are known.
        recipe: "crop-flip", or "autoaugment-cutout" besides.
        generator: draws the augmentation, on the CPU.
    """

    def __init__(self, pixels: Tensor, dataset: str, recipe: str, generator: torch.Generator) -> None:
        source = SOURCES[dataset]
        self.size = pixels.shape[-1]
        self.padding = source.crop_padding * self.size // IMAGE_SIZE
        self.pixels = F.pad(pixels, (self.padding,) * 4).permute(0, 2, 3, 1).contiguous()
        self.flip, self.recipe, self.generator = source.flip, recipe, generator
        self.mean, self.std = (255 * torch.tensor(v, device=pixels.device) for v in (source.mean, source.std))

    def plain(self, indices: Tensor) -> Tensor:
        """Return the images numbered (B,) as they are, float (B, 3, S, S)."""
        centre = torch.full((len(indices), 1), self.padding)
        return self._normalised(self._windows(indices, centre, centre))

    def augmented(self, indices: Tensor) -> Tensor:
        """Return the images numbered (B,), each cut and flipped at random, float (B, 3, S, S)."""
        top, left = torch.randint(0, 2 * self.padding + 1, (2, len(indices), 1), generator=self.generator)
        mirrored = torch.rand(len(indices), 1, generator=self.generator) < 0.5 * self.flip
        windows = self._windows(indices, top, left, mirrored)
        if self.recipe == "autoaugment-cutout":
            windows = self._cutout(self._autoaugment(windows))
        return self._normalised(windows)

    def _windows(self, indices: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None = None) -> Tensor:
        device, steps = self.pixels.device, torch.arange(self.size)
        columns = steps if mirrored is None else torch.where(mirrored, steps.flip(0), steps)
        rows, columns = (top + steps).to(device), (left + columns).to(device)
        return self.pixels[indices.to(device)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _normalised(self, windows: Tensor) -> Tensor:
        return ((windows - self.mean) / self.std).permute(0, 3, 1, 2)

    def _autoaugment(self, windows: Tensor) -> Tensor:
        """Apply AutoAugment's CIFAR policy (Cubuk et al., arXiv 1805.09501), one draw to a few images."""
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        groups = windows.permute(0, 3, 1, 2).split(POLICY_GROUP)
        return torch.cat([policy(group) for group in groups]).permute(0, 2, 3, 1)

    def _cutout(self, windows: Tensor) -> Tensor:
        """Blank a square of half the image's width, whose centre is anywhere (DeVries & Taylor, arXiv 1708.04552)."""
        centres = torch.randint(0, self.size, (2, len(windows), 1), generator=self.generator).to(windows.device)
        steps = torch.arange(self.size, device=windows.device)
        half = self.size // 4
        inside = (steps >= centres - half) & (steps < centres + half)
        hole = inside[0][:, :, None] & inside[1][:, None, :]
        return torch.where(hole[..., None], self.mean.round().to(windows.dtype), windows)
