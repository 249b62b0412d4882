"""Networks that the example does not have: a small ViT, and EfficientNet-Lite with its weights of ImageNet."""

from __future__ import annotations

import timm
from torch import nn

from examples.common.models import build_model
from examples.common.pretrained import PACKAGED, packaged_network


def build_network(name: str, num_classes: int) -> nn.Module:
    """Return a network by its name: one of the packaged ones, "vit-small-images", or a name of the example's."""
    if name in PACKAGED:
        return packaged_network(name, num_classes)
    if name == "vit-small-images":
        return timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=num_classes
        )
    return build_model(name, num_classes)
