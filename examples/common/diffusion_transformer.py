"""A small diffusion transformer (DiT: Peebles & Xie, arXiv 2212.09748): blocks whose norms follow time and class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiffusionTransformer(nn.Module):
    """Predicts the velocity of noisy images, given how noisy they are and their classes.

    The layers that scale and shift start at zero, so each block starts as the identity and the output at zero. A label
    of `num_classes`, one after the last class, stands for no class at all.

    Args:
        image_size: pixels a side, a multiple of `patch`.
        patch: pixels a side of what becomes one token.
        width: channels of a token, a multiple of twice the heads.
        depth: number of blocks.
        heads: heads of the attention.
        num_classes: classes that an image may have.

    Example:
        >>> net = DiffusionTransformer(16, patch=4, width=32, depth=2, heads=2, num_classes=10)
        >>> net(torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([1, 2, 3])).shape
        torch.Size([3, 3, 16, 16])
    """

    def __init__(self, image_size: int, *, patch: int, width: int, depth: int, heads: int, num_classes: int) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"the image size must be a multiple of the patch; got {image_size} and {patch}")
        if width % (2 * heads):
            raise ValueError(f"the width must be a multiple of twice the heads; got {width} and {heads}")
        self.patch = patch
        self.to_tokens = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn((image_size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.to_pixels = zero(nn.Linear(width, 3 * patch**2))

    def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity (B, 3, H, W) of images (B, 3, H, W) at times (B,) in [0, 1], of classes (B,) or none."""
        condition = F.silu(self.time(waves(time, self.places.shape[1])) + self.classes(labels))
        tokens = self.to_tokens(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens, condition)
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=2)
        pixels = self.to_pixels(self.norm(tokens) * (1 + scale) + shift)
        return F.fold(pixels.transpose(1, 2), images.shape[2:], self.patch, stride=self.patch)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and before a gate that time and class decide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.query_key_value, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the tokens (B, N, C) of the next block; `condition` is (B, C)."""
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=2)
        tokens = tokens + gate * self.attend(self.norms[0](tokens) * (1 + scale) + shift)
        return tokens + gate2 * self.perceptron(self.norms[1](tokens) * (1 + scale2) + shift2)

    def attend(self, tokens: Tensor) -> Tensor:
        """Self-attention over the tokens."""
        split = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mixed(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


def zero(layer: nn.Linear) -> nn.Linear:
    """Return the layer with zeros for weights."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def waves(time: Tensor, width: int) -> Tensor:
    """Return sines and cosines of times in [0, 1], (B, width), of periods from a thousandth to ten."""
    periods = torch.logspace(-3, 1, width // 2, device=time.device)
    angles = 2 * math.pi * time[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=1)
