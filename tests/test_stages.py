"""Stages are found in any convolutional classifier, and named stages are checked."""

import pytest
import torch
from torch import nn
from torchvision import models

import sfr
from sfr.stages import infer_layout, resolve_pairs

TORCHVISION_STAGES = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "vgg11_bn": ("features.2", "features.6", "features.13", "features.20", "features.27"),
    "densenet121": ("features.relu0", *(f"features.denseblock{k}" for k in (1, 2, 3)), "features"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features"),
    "mobilenet_v3_small": ("features.0", "features.1", "features.3", "features.8", "features"),
    "efficientnet_b0": ("features.1", "features.2", "features.3", "features.5", "features"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features"),
}


@pytest.mark.parametrize("name", TORCHVISION_STAGES)
def test_the_last_block_at_each_resolution_is_a_stage(name):
    model = sfr.SFRWrapper(getattr(models, name)(num_classes=4), example_input=torch.zeros(1, 3, 64, 64))
    assert model.stage_names == TORCHVISION_STAGES[name]


def test_the_first_training_forward_discovers_the_stages_of_an_example_input(make_net, batch):
    plain = make_net()
    from_example = sfr.SFRWrapper(plain, example_input=batch[0])
    names = from_example.stage_names
    lazy = sfr.SFRWrapper(from_example.unwrap())
    assert lazy.stage_names is None
    lazy(batch[0])
    assert lazy.stage_names == names == ("1", "3", "5")


def test_a_backbone_inside_a_larger_model_is_looked_into():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = models.resnet18()

        def forward(self, image):
            return self.backbone(image)

    model = sfr.SFRWrapper(Net(), example_input=torch.zeros(1, 3, 64, 64))
    assert model.stage_names == tuple(f"backbone.{name}" for name in TORCHVISION_STAGES["resnet18"])


def test_three_dimensional_convolutions_have_stages_too():
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 8, 3, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model = sfr.SFRWrapper(net)
    logits = model(torch.randn(2, 1, 8, 8, 8))
    sfr.SFRLoss(model)(logits, torch.tensor([0, 1])).backward()
    assert model.stage_names == ("0", "1")


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10)), id="none"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), id="one"),
    ],
)
def test_a_model_with_less_than_two_stages_is_an_error_that_says_what_to_do(net):
    with pytest.raises(ValueError, match=r"found \d stage\(s\).*stages=\["):
        sfr.SFRWrapper(net, example_input=torch.zeros(2, 3, 16, 16))
    model = sfr.SFRWrapper(net)
    with pytest.raises(ValueError, match="two are needed"):
        model(torch.zeros(2, 3, 16, 16))
    assert not any(module._forward_hooks for module in net.modules())


def test_stages_can_be_named(make_net):
    assert sfr.SFRWrapper(make_net(), stages=["0", "4"]).stage_names == ("0", "4")


def test_stages_can_be_a_regular_expression():
    model = sfr.SFRWrapper(models.resnet18(), stages=r"layer[124]")
    assert model.stage_names == ("layer1", "layer2", "layer4")


def test_an_unknown_stage_is_an_error_that_lists_near_names():
    with pytest.raises(ValueError, match=r"no stage 'layer5'; near names: .*layer4"):
        sfr.SFRWrapper(models.resnet18(), stages=["layer1", "layer5"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["layer1", "layer1"], "repeated"),
        (["layer1"], "two are needed"),
        ("nothing.*", "gives 0 stage"),
        ("layer[", "no regular expression"),
    ],
)
def test_bad_stages_are_an_error(stages, message):
    with pytest.raises(ValueError, match=message):
        sfr.SFRWrapper(models.resnet18(), stages=stages)


def test_pairs_are_all_last_adjacent_or_given():
    names = ["a", "b", "c"]
    assert resolve_pairs("all", names) == [(0, 1), (0, 2), (1, 2)]
    assert resolve_pairs("last", names) == [(0, 2), (1, 2)]
    assert resolve_pairs("adjacent", names) == [(0, 1), (1, 2)]
    assert resolve_pairs([("a", "c"), (0, -2)], names) == [(0, 2), (0, 1)]


@pytest.mark.parametrize(
    ("pair", "message"), [(("a", "x"), "no stage 'x'"), ((0, 3), "out of range"), (("b", "a"), "must come after")]
)
def test_a_bad_pair_is_an_error(pair, message):
    with pytest.raises(ValueError, match=message):
        resolve_pairs([pair], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("stage", "shape", "layout"),
    [
        (nn.Conv2d(3, 8, 1), (2, 8, 4, 4), "channels_first"),
        (nn.ReLU(), (2, 8, 4, 4), "channels_first"),
        (nn.Conv1d(3, 8, 1), (2, 8, 4), "channels_first"),
        (nn.Linear(3, 8), (2, 4, 8), "tokens"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (2, 4, 4, 8), "channels_last"),
        (nn.Linear(3, 8), (2, 8), "vector"),
    ],
)
def test_the_layout_follows_from_axes_and_kind(stage, shape, layout):
    assert infer_layout(stage, torch.zeros(shape)) == layout


def test_a_stage_of_unknown_layout_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x[:, :, :, :, None, None]

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(), nn.Flatten(), nn.Linear(4 * 16, 3))
    model = sfr.SFRWrapper(net, stages=["0", "1"])
    with pytest.raises(ValueError, match=r"stage '1' has shape .*layout"):
        sfr.SFRLoss(model)(model(torch.zeros(2, 3, 4, 4)), torch.tensor([0, 1]))
