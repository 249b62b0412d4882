"""Corrupted CIFAR images: noise, blur, light and compression at the strengths of CIFAR-10-C.

The strengths are those of Hendrycks & Dietterich (arXiv 1903.12261) for 32x32 images. Their weather, motion and elastic
corruptions need photographs or ImageMagick and are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

SEVERITIES = (1, 3, 5)
Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=generator)


def shot_noise(images: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(images * photons, generator) / photons


def impulse_noise(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    salt_or_pepper = torch.randint(0, 2, images.shape, generator=generator).float()
    return torch.where(torch.rand(images.shape, generator=generator) < share, salt_or_pepper, images)


def gaussian_blur(images: Tensor, deviation: float, _: torch.Generator) -> Tensor:
    return tv.gaussian_blur(images, [9, 9], [deviation, deviation])


def brightness(images: Tensor, shift: float, _: torch.Generator) -> Tensor:
    """Raise the value of hue, saturation and value."""
    value = images.amax(dim=1, keepdim=True)
    return torch.where(value > 0, images * ((value + shift).clamp_max(1) / value.clamp_min(1e-6)), shift)


def contrast(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (images - mean)


def pixelate(images: Tensor, scale: float, _: torch.Generator) -> Tensor:
    small = F.interpolate(images, size=int(scale * images.shape[-1]), mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="area")


def jpeg(images: Tensor, quality: float, _: torch.Generator) -> Tensor:
    return torch.stack([tv.jpeg(image, int(quality)) for image in to_bytes(images)]) / 255


# Strengths at severities 1, 3 and 5.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.08, 0.10)),
    "shot_noise": (shot_noise, (500, 100, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.03, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.7, 1.0)),
    "brightness": (brightness, (0.05, 0.15, 0.3)),
    "contrast": (contrast, (0.75, 0.4, 0.15)),
    "pixelate": (pixelate, (0.95, 0.85, 0.65)),
    "jpeg": (jpeg, (80, 58, 40)),
}


def corrupted(pixels: Tensor, name: str, severity: int) -> Tensor:
    """Return uint8 images (N, 3, H, W) with one corruption, the same at each call.

    Raises:
        KeyError, ValueError: for a corruption or severity that is not listed here.
    """
    corrupt, strengths = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(0)
    return to_bytes(corrupt(pixels / 255, strengths[SEVERITIES.index(severity)], generator))


def to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().byte()
