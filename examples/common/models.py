"""Classifiers for 32x32 images: the small CIFAR ResNets, wide ResNets, and every torchvision and timm name."""

import difflib

import timm
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 with three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(BasicBlock, 16, 16, blocks, stride=1)
        self.layer2 = stage(BasicBlock, 16, 32, blocks, stride=2)
        self.layer3 = stage(BasicBlock, 32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class PreActivationBlock(nn.Module):
    """Normalise and activate before each convolution (Zagoruyko & Komodakis, arXiv 1605.07146)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-width: depth 6n + 4, three stages of 16, 32 and 64 times `width` channels."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = stage(PreActivationBlock, 16, 16 * width, blocks, stride=1)
        self.layer2 = stage(PreActivationBlock, 16 * width, 32 * width, blocks, stride=2)
        self.layer3 = stage(PreActivationBlock, 32 * width, 64 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean(dim=(2, 3)))


RESNET_DEPTHS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
WIDE_RESNETS = {
    "wrn_16_2": (16, 2),
    "wrn_40_1": (40, 1),
    "wrn_40_2": (40, 2),
    "wrn_28_10": (28, 10),
}


def build_model(name: str, num_classes: int) -> nn.Module:
    """The untrained classifier called `name`: one of this file's, else torchvision's, else timm's.

    torchvision's ResNets get the stem for small images: a 3x3 convolution of stride 1, no pooling.
    """
    if name in RESNET_DEPTHS:
        return CifarResNet(RESNET_DEPTHS[name], num_classes)
    if name in WIDE_RESNETS:
        return WideResNet(*WIDE_RESNETS[name], num_classes)
    if name in torchvision_names():
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        return with_cifar_stem(model)
    if timm.is_model(name):
        return timm.create_model(name, num_classes=num_classes)
    raise SystemExit(f"--model {name}: no such model here, in torchvision or in timm{near(name)}")


def stage(
    block: type[BasicBlock] | type[PreActivationBlock],
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def with_cifar_stem(model: nn.Module) -> nn.Module:
    if isinstance(model, torchvision.models.ResNet):
        channels = model.conv1.out_channels
        model.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def torchvision_names() -> list[str]:
    """Classifiers only: list_models() without a module also names detectors and the like."""
    return torchvision.models.list_models(module=torchvision.models)


def near(name: str) -> str:
    known = [*RESNET_DEPTHS, *WIDE_RESNETS, *torchvision_names(), *timm.list_models()]
    matches = difflib.get_close_matches(name, known)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
