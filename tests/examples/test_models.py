"""Every model name gives an untrained classifier for small images."""

import pytest
import torch

from common.models import build_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 278_324),
        ("resnet32", 472_756),
        ("wrn_16_2", 703_284),
        ("wrn_40_1", 569_780),
    ],
)
def test_small_networks_have_their_published_sizes_for_100_classes(name, parameters):
    assert sum(p.numel() for p in build_model(name, 100).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "resnet18", "mobilenet_v2", "resnet26t"])
def test_own_torchvision_and_timm_names_classify_32_pixel_images(name):
    model = build_model(name, 7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_torchvision_resnet_keeps_the_full_resolution_in_its_first_stage():
    model = build_model("resnet18", 10)
    stem = torch.nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_unknown_name_is_an_error_that_lists_near_ones():
    with pytest.raises(SystemExit, match=r"resnet21.*did you mean.*resnet20"):
        build_model("resnet21", 10)
