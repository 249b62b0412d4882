"""The models that are tried: every one of torchvision's, and the smallest of each timm module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from sfr.model.outputs import logits_in

TORCHVISION = {
    "torchvision": torchvision.models,
    "torchvision.segmentation": torchvision.models.segmentation,
    "torchvision.video": torchvision.models.video,
}
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 384)
FRAMES = {"torchvision.video": (16,)}


def zoo(known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield group and name of every model to try; `known` remembers the smallest model of each timm module."""
    for group, module in TORCHVISION.items():
        for name in torchvision.models.list_models(module=module):
            yield group, name
    for family in timm.list_modules():
        if family not in known:
            known[family] = smallest(family)
        yield f"timm.{family}", known[family]


def smallest(family: str) -> str:
    """Return the architecture of a timm module that has the fewest parameters, without memory for its weights."""

    def size(name: str) -> float:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=10).parameters())

    # Those named test_ are stand-ins of timm's own tests.
    return min((name for name in timm.list_models(module=family) if not name.startswith("test_")), key=size)


def build(name: str, group: str) -> nn.Module:
    if group.startswith("timm."):
        return timm.create_model(name, pretrained=False, num_classes=10)
    arguments: dict[str, Any] = {"weights": None, "num_classes": 10}
    if group == "torchvision.segmentation":
        arguments |= {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": True}
    return torchvision.models.get_model(name, **arguments)


def smallest_input(model: nn.Module, group: str) -> Tensor:
    """Return two random inputs of the smallest size that the model takes in evaluation and training."""
    settings = getattr(model, "default_cfg", {})  # of timm
    if settings.get("fixed_input_size"):
        return torch.randn(2, *settings["input_size"])
    for size in SIZES:
        inputs = torch.randn(2, 3, *FRAMES.get(group, ()), size, size)
        try:
            with torch.no_grad():
                model.train()(inputs)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        return inputs
    raise ValueError(f"{type(model).__name__} takes none of the sizes {SIZES}")


def logits_of(output: Any) -> Tensor:
    """Return the logits of a batch, (B, K): auxiliary ones are left out, those of pixels or tokens averaged."""
    logits = logits_in(output)
    assert logits is not None  # all of these models return some
    if logits.ndim == 3:
        return logits.mean(dim=1)
    return logits.flatten(2).mean(dim=2) if logits.ndim > 3 else logits
