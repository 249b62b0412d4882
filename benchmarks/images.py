"""Images in memory, cut, flipped and normalised a whole batch at a time, on whatever device it lies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from cifar_data import IMAGE_SIZE, Labelled, hold_out, load_splits  # noqa: E402
from cifar_data import SOURCES as CIFAR_SOURCES  # noqa: E402
from small_sets import SMALL_SOURCES, load_small  # noqa: E402
from whole_file import replace_file  # noqa: E402

SOURCES = CIFAR_SOURCES | SMALL_SOURCES
HELD_OUT = 5000  # of CIFAR's 50,000 training images, for every choice that is made
HELD_OUT_SMALL = 0.2  # of the training images of a small data set
POLICY_GROUP = 8  # images that share one draw of AutoAugment


class Parts(NamedTuple):
    """What a cell trains on and what it is judged on."""

    train: Labelled
    judged: Labelled


def load_parts(dataset: str, data_dir: Path | None, cache: Path, part: str) -> Parts:
    """Return the training images without the held-out ones, and these; or all of them, and the test set.

    The decoded images are kept in the folder `cache`.
    """
    train, test = (Labelled(*split) for split in torch.load(decoded(dataset, data_dir, cache)))
    if part == "test":
        return Parts(train, test)
    share = HELD_OUT_SMALL if dataset in SMALL_SOURCES else HELD_OUT / len(train.labels)
    return Parts(*hold_out(train, share))


def decoded(dataset: str, data_dir: Path | None, cache: Path) -> Path:
    """Return the file of a data set's decoded images, pixels and labels of training and test; made if it is missing."""
    file = cache / f"{dataset}.pt"
    if not file.exists():
        parts = both_parts(dataset, data_dir)
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: torch.save([tuple(part) for part in parts], path))
    return file


def both_parts(dataset: str, data_dir: Path | None) -> tuple[Labelled, Labelled]:
    """Return all training and all test images of a data set."""
    if dataset in SMALL_SOURCES:
        return load_small(dataset, data_dir)
    splits = load_splits(dataset, data_dir)
    return splits.train.data, splits.test.data


def few_per_class(data: Labelled, per_class: int, generator: torch.Generator) -> Labelled:
    """Return `per_class` random images of each class, class by class."""
    return data.take(balanced_indices(data.labels, per_class, generator))


def balanced_indices(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the numbers of `per_class` random images of each class, class by class."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])


def with_noise(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return the labels with `share` of them replaced by another class, each other class equally likely."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + shift) % num_classes
    return noisy


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
