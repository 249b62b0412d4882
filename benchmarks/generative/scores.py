"""How good are a network that draws and its features, by what needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data import Labelled
from examples.common.diffusion_transformer import DiffusionTransformer
from examples.common.flow import noisy
from examples.common.frozen_features import linear_accuracy
from examples.common.pretrained import packaged_network

SEEN_SIZE = 64  # pixels a side, as which EfficientNet-Lite0 sees the images
PROBE_TIME = 0.25  # how noisy the images are from whose tokens a class is read: 0 is the image, 1 is noise
BATCH = 250


class Seen(nn.Module):
    """What EfficientNet-Lite0, trained on ImageNet, sees in images: its last 320 channels, averaged over the places.

    Fewer than the 1,280 behind its head, so that their covariance is known from some thousand images.
    """

    num_features = 320

    def __init__(self) -> None:
        super().__init__()
        network: Any = packaged_network("efficientnet-lite0").eval()
        self.layers = nn.Sequential(network.conv_stem, network.bn1, network.blocks)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 320) of images (B, 3, H, W) in [-1, 1]."""
        enlarged = F.interpolate(images, size=(SEEN_SIZE, SEEN_SIZE), mode="bilinear", antialias=False)
        return self.layers(enlarged).mean(dim=(2, 3))


def frechet_distances(real: Tensor, others: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Return how far the features of some sets of images are from those of real ones, all (N, 3, H, W).

    Features are taken as normally distributed (Heusel et al., arXiv 1706.08500). They are those of :class:`Seen`, not
    Inception's: the numbers compare with one another, not with those of papers.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(feature=Seen(), reset_real_features=False).to(device)

    def update(images: Tensor, is_real: bool) -> None:
        for part in images.clip(-1, 1).split(BATCH):
            distance.update(part.to(device), real=is_real)

    update(real, is_real=True)
    found = {}
    for name, images in others.items():
        distance.reset()  # the images, not the real ones
        update(images, is_real=False)
        found[name] = float(distance.compute())
    return found


@torch.no_grad()
def block_features(network: DiffusionTransformer, images: Tensor, no_class: int) -> list[Tensor]:
    """Return of each block the mean of its tokens, (N, width), for images (N, 3, H, W) with some noise and no class."""
    device = next(network.parameters()).device
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    points, _ = noisy(images, noise, torch.full((len(images),), PROBE_TIME))
    means: list[list[Tensor]] = [[] for _ in network.blocks]
    handles = [
        block.register_forward_hook(lambda _block, _inputs, tokens, kept=kept: kept.append(tokens.mean(dim=1).cpu()))
        for block, kept in zip(network.blocks, means, strict=True)
    ]
    for part in points.to(device).split(BATCH):
        time = part.new_full((len(part),), PROBE_TIME)
        network(part, time, torch.full_like(time, no_class, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return [torch.cat(kept) for kept in means]


def probes(network: DiffusionTransformer, train: Labelled, test: Labelled, classes: int) -> list[float]:
    """Return of each block the share of the test images that a linear classifier of its features gets right.

    Args:
        network: what is judged.
        train: images (N, 3, H, W) in [-1, 1] and labels (N,) that the classifiers are fitted to.
        test: the same of those that they are judged on.
        classes: how many there are; the label after the last stands for no class.
    """
    features = (block_features(network, part.pixels, classes) for part in (train, test))
    return [
        linear_accuracy(own, train.labels, other, test.labels, classes) for own, other in zip(*features, strict=True)
    ]
