"""The first training step, which watches the forward, costs what later ones do."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

import sfr
from sfr.preflight.cost import peak_memory

pytestmark = pytest.mark.filterwarnings("ignore:all the supervised stages are frozen")

CPU = torch.device("cpu")


class Residual(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = conv(), nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Checkpointed(nn.Module):
    """Runs each of its blocks inside a checkpoint."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, 4)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2)


class Head(nn.Module):
    """Mean over all positions, and a classifier."""

    def __init__(self, width=16):
        super().__init__()
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(x.mean((2, 3)) if x.ndim == 4 else x.mean(1))


class SideBySide(nn.Module):
    """Two maps that exchange what they hold, and then go through one and the same layer, as in CoaT."""

    def __init__(self):
        super().__init__()
        self.large, self.small = conv(), conv()
        self.after_large = self.after_small = conv()

    def forward(self, large, small):
        large, small = self.large(large), self.small(small)
        large, small = large + F.interpolate(small, scale_factor=2.0), small + F.interpolate(large, scale_factor=0.5)
        return large + self.after_large(large), small + self.after_small(small)


class TwoLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stride = stem(), nn.Conv2d(16, 16, 3, 2, 1)
        self.blocks = nn.ModuleList(times(8, SideBySide))

    def forward(self, x):
        large = self.stem(x)
        small = self.stride(large)
        for block in self.blocks:
            large, small = block(large, small)
        return F.interpolate(large, scale_factor=0.5) + small


class Functional(nn.Module):
    """Forty convolutions in a list, with an activation that is no module."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([stem(), *(conv() for _ in range(39))])

    def forward(self, x):
        for layer in self.convs:
            x = layer(x).relu()
        return x


def conv():
    return nn.Conv2d(16, 16, 3, padding=1)


def stem():
    return nn.Conv2d(3, 16, 3, padding=1)


def times(count, *builders):
    return [build() for _ in range(count) for build in builders]


def mlp():
    return Residual(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)))


def norm():
    return nn.BatchNorm2d(16)


def frozen(body, head):
    return nn.Sequential(body.requires_grad_(False), head)


def frozen_resnet():
    net = models.resnet50(num_classes=10).requires_grad_(False)
    net.fc.requires_grad_(True)
    return net


def hierarchy():
    widths = (3, 16, 32, 64)
    layers = []
    for inputs, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, width, 3, 2 if inputs > 3 else 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(12):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def attention():
    return nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)


MODELS = {
    "checkpointed residual blocks": lambda: nn.Sequential(
        stem(), Checkpointed(*(Residual(nn.Sequential(conv(), nn.GELU(), conv())) for _ in range(12))), Head()
    ),
    "checkpointed sequences": lambda: nn.Sequential(
        stem(), Checkpointed(*(nn.Sequential(conv(), norm(), nn.ReLU()) for _ in range(12))), Head()
    ),
    "checkpointed perceptrons": lambda: nn.Sequential(Patches(), Checkpointed(*times(12, mlp)), Head(32)),
    "checkpointed transformer": lambda: nn.Sequential(Patches(), Checkpointed(*times(12, attention)), Head(32)),
    "frozen layers": lambda: frozen(nn.Sequential(stem(), *times(39, conv, nn.ReLU)), Head()),
    "frozen normalised layers": lambda: frozen(nn.Sequential(stem(), *times(39, conv, norm, nn.ReLU)), Head()),
    "frozen layers, a trained one": lambda: frozen(
        nn.Sequential(stem(), *times(39, conv, nn.ReLU)), nn.Sequential(conv(), Head())
    ),
    "frozen blocks": lambda: frozen(nn.Sequential(stem(), *times(40, Layer)), Head()),
    "frozen layers in a list": lambda: frozen(Functional(), Head()),
    "frozen transformer": lambda: frozen(nn.Sequential(Patches(), *times(40, attention)), Head(32)),
    "frozen hierarchy": lambda: frozen(hierarchy(), Head(64)),
    "frozen ResNet-50": frozen_resnet,
    "levels that share a layer": lambda: nn.Sequential(TwoLevels(), Head()),
    "ResNet-18": lambda: models.resnet18(num_classes=10),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_step_takes_no_more_memory_than_the_second_and_has_the_features(kind):
    model = sfr.SFRWrapper(MODELS[kind]())
    criterion = sfr.SFRLoss(model)
    pairs = []

    def step():
        criterion(model(images), torch.arange(4)).backward()
        pairs.append(set(criterion.last.pairs))
        model.zero_grad()

    images = torch.randn(4, 3, 32, 32)
    first, second = (peak_memory(step, CPU) for _ in range(2))
    assert first <= 1.1 * second
    assert pairs[0] == pairs[1] != set()


def test_a_forward_that_is_watched_for_named_stages_keeps_nothing_else():
    body = nn.Sequential(stem(), *times(39, conv, nn.ReLU))
    model = sfr.SFRWrapper(frozen(body, Head()), stages=["0.0", "0.2"])
    images = torch.randn(4, 3, 32, 32)
    first, second = (peak_memory(lambda: model(images), CPU) for _ in range(2))
    assert first <= 1.01 * second


def test_what_was_watched_is_released_after_the_step():
    model = sfr.SFRWrapper(MODELS["frozen layers, a trained one"]())
    images, seen = torch.randn(4, 3, 32, 32), []
    model.get_submodule("0.10").register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    sfr.SFRLoss(model)(model(images), torch.arange(4)).backward()
    gc.collect()
    assert [reference() for reference in seen] == [None]
