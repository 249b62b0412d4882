"""The net of the equality matrix."""

import torch
from torch import nn


def group_norm_net(classes: int = 10) -> nn.Sequential:
    """Three stages, always the same weights, and no batch statistics: those of a part are not those of a batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.GroupNorm(2, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
