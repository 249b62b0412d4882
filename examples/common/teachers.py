"""Frozen teachers: their weights, the images as they know them, and their features."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn

from sfr.pretrain import PooledFeatures

from . import models, weights
from .data import Source
from .pretrained import PACKAGED, packaged_network

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AsTrained(nn.Module):
    """A network behind what brings normalised images of a data set to the size and the normalisation it is used to.

    Args:
        network: takes images of side `size`.
        source: the data set.
        mean, std: of the colours that the network was trained with, three each.
        size: side of the images in pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, source: Source, mean: tuple[float, ...], std: tuple[float, ...], size: int
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        own_mean, own_std, mean_, std_ = (
            torch.tensor(value).view(3, 1, 1) for value in (source.mean, source.std, mean, std)
        )
        self.register_buffer("scale", own_std / std_, persistent=False)
        self.register_buffer("shift", (own_mean - mean_) / std_, persistent=False)

    def forward(self, images: Tensor) -> Any:
        """Return what the network says of images (B, 3, H, W)."""
        return self.network(F.interpolate(images * self.scale + self.shift, self.size, mode="bilinear"))


def load_teacher(name: str, file: str | None, source: Source, size: int, at: str | None = None) -> PooledFeatures:
    """Return the features of a teacher.

    Args:
        name: of the network; see :func:`common.models.build_model` and :data:`common.pretrained.PACKAGED`.
        file: its weights, or "pretrained" for those that its library or package has.
        source: the data set whose images it will see.
        size: side in pixels that the images are enlarged to for weights of a library or package.
        at: name of the submodule whose output is taken; None for the place before the last activation.
    """
    if file == "pretrained":
        network, mean, std = library_network(name)
        return PooledFeatures(AsTrained(network, source, mean, std, size), at and f"network.{at}")
    network = models.build_model(name, source.num_classes)
    try:
        network.load_state_dict(weights.read_weights(str(file), "--teacher-weights"))
    except RuntimeError as error:
        classes = source.num_classes
        raise SystemExit(f"--teacher-weights: {file} does not fit {name} with {classes} classes: {error}") from error
    return PooledFeatures(network, at)


def library_network(name: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Return a network with the weights of its package or library, and the mean and deviation of its images."""
    if name in PACKAGED:
        return packaged_network(name), (0.5,) * 3, (0.5,) * 3
    if name in models.torchvision_names():
        return torchvision.models.get_model(name, weights="DEFAULT"), *IMAGENET
    network: Any = timm.create_model(name, pretrained=True)
    return network, network.default_cfg["mean"], network.default_cfg["std"]


class Teacher:
    """What the student learns of a batch: features of the teacher, computed now or read with the images.

    Args:
        network: the frozen teacher, on its device, in evaluation mode.
        accelerator: gives the precision.
    """

    def __init__(self, network: PooledFeatures, accelerator: Accelerator) -> None:
        self.network, self.accelerator = network, accelerator

    @torch.no_grad()
    def __call__(self, images: Tensor, given: Tensor) -> Tensor:
        """Return features (B, D) of images (B, 3, H, W); `given` are labels (B,), or the features themselves."""
        if given.ndim == 2:
            return given
        with self.accelerator.autocast():
            return self.network(images)
