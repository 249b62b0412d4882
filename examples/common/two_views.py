"""SimCLR's augmentation for a whole batch at once, each image with random numbers of its own, in three operations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from .data import Source

# Luma and the two chroma axes of YIQ: saturation scales the chroma plane, hue turns it.
RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def plain_view(pixels: Tensor, size: int, source: Source) -> Tensor:
    """Return uint8 images (B, 3, H, W) as they are, in the size of the views, normalised."""
    images = F.interpolate(pixels / 255, (size, size), mode="bilinear", antialias=True)
    return normalize(images, list(source.mean), list(source.std))


def augment(images: Tensor, size: int, smallest_crop: float, flip: bool) -> Tensor:
    """Return one random view of each image: crop and resize, mirror, colour jitter, greyscale.

    Args:
        images: shape (B, 3, H, W), values in [0, 1].
        size: height and width of the views.
        smallest_crop: smallest area of a crop, as a share of the image.
        flip: mirror every second view.
    """
    views = F.grid_sample(images, crops(len(images), size, smallest_crop, flip, images), align_corners=False)
    return jitter(views).contiguous(memory_format=torch.channels_last)


def crops(count: int, size: int, smallest: float, flip: bool, like: Tensor) -> Tensor:
    """Sampling grids (B, size, size, 2) of crops with area in [`smallest`, 1] and aspect ratio in [3/4, 4/3]."""
    area = uniform(count, smallest, 1.0, like)
    aspect = uniform(count, math.log(3 / 4), math.log(4 / 3), like).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = ((1 - side) * uniform(count, -1.0, 1.0, like) for side in (width, height))
    mirrored = torch.where(coin(count, 0.5, like), -width, width) if flip else width
    none = torch.zeros_like(x)
    rows = torch.stack([torch.stack([mirrored, none, x], 1), torch.stack([none, height, y], 1)], 1)
    return F.affine_grid(rows, [count, 3, size, size], align_corners=False)


def jitter(views: Tensor) -> Tensor:
    """Colour jitter of SimCLR's strength 0.5 on 80 % of the views, and greyscale on 20 % of them.

    Brightness, contrast, saturation and hue come in this order, where SimCLR draws the order at random; but for the
    clipping at the end they are linear, so that one matrix for each view does them all.
    """
    count = len(views)
    brightness, contrast, saturation = (uniform(count, 0.6, 1.4, views) for _ in range(3))
    hue = uniform(count, -0.1, 0.1, views) * 2 * math.pi
    kept = ~coin(count, 0.8, views)
    brightness, contrast, saturation = (factor.masked_fill(kept, 1.0) for factor in (brightness, contrast, saturation))
    saturation = saturation.masked_fill(coin(count, 0.2, views), 0.0)
    hue = hue.masked_fill(kept, 0.0)

    to_yiq = RGB_TO_YIQ.to(views)
    grey = torch.einsum("c,bchw->b", to_yiq[0], views)[:, None, None] / views[0, 0].numel()
    centre = grey * (brightness * (1 - contrast))[:, None, None]
    cosine, sine = saturation * hue.cos(), saturation * hue.sin()
    none, one = torch.zeros_like(hue), torch.ones_like(hue)
    turn = torch.stack([one, none, none, none, cosine, -sine, none, sine, cosine], 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    return torch.baddbmm(centre, matrix, views.flatten(2)).clamp(0, 1).view_as(views)


def uniform(count: int, low: float, high: float, like: Tensor) -> Tensor:
    return torch.empty(count, device=like.device, dtype=like.dtype).uniform_(low, high)


def coin(count: int, probability: float, like: Tensor) -> Tensor:
    return torch.rand(count, device=like.device) < probability
