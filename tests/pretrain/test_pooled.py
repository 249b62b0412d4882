"""Pooled features: those before the last activation, of many kinds of networks, which stay as they are."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sfr.pretrain import PooledFeatures

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def before_last_relu_of(module: nn.Module, model: nn.Module) -> Tensor:
    """Mean over space of the last input of a module in one forward, by a plain hook."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    return inputs[-1].mean(dim=(2, 3))


def perturbed(model: nn.Module) -> nn.Module:
    """Weights away from their initial values: some networks start their last block as the identity."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "activation"),
    [
        (lambda: torchvision.models.resnet18(weights=None), "layer4.1.relu"),  # one module, used twice, in place
        (lambda: torchvision.models.resnet50(weights=None), "layer4.2.relu"),
        (lambda: timm.create_model("resnet18"), "layer4.1.act2"),
        (lambda: timm.create_model("resnet26"), "layer4.1.act3"),
        (lambda: torchvision.models.mobilenet_v2(weights=None), "features.18.2"),
        (lambda: timm.create_model("mobilenetv2_050"), "bn2.act"),
    ],
    ids=["torchvision basic", "torchvision bottleneck", "timm basic", "timm bottleneck", "mobilenet", "timm mobilenet"],
)
def test_features_are_those_before_the_last_relu(build: Any, activation: str) -> None:
    model = perturbed(build())
    expected = before_last_relu_of(model.get_submodule(activation), model)
    features = PooledFeatures(model)(IMAGES)
    assert (features < 0).any()
    torch.testing.assert_close(features, expected)


class Functional(nn.Module):
    """A network without one activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        return self.fc(x.relu_().mean(dim=(2, 3)))


def test_activation_may_be_a_function_that_writes_over_its_input() -> None:
    model = Functional()
    expected = model.conv2(F.relu(model.conv1(IMAGES))).mean(dim=(2, 3))
    torch.testing.assert_close(PooledFeatures(model)(IMAGES), expected)


@pytest.mark.parametrize(
    "activation",
    [nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.RReLU, nn.Hardsigmoid, nn.Tanhshrink, nn.SELU],
)
def test_any_activation_of_torch_is_one(activation: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)
    )
    torch.testing.assert_close(PooledFeatures(model)(IMAGES), model[0](IMAGES).mean(dim=(2, 3)))


def test_activation_of_a_vector_may_write_over_its_input() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 2))
    images = torch.randn(4, 3, 2, 2)
    features = PooledFeatures(model)(images)
    torch.testing.assert_close(features, model[:2](images))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_of_a_vision_transformer_are_its_pooled_tokens(pool: str) -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.models.VisionTransformer(**options, global_pool=pool, num_classes=5).eval()
    expected = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(PooledFeatures(model)(IMAGES), expected)


def test_features_of_torchvisions_vision_transformer_are_its_class_token() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    weight = model.heads.head.weight
    torch.testing.assert_close(PooledFeatures(model)(IMAGES) @ weight.T + model.heads.head.bias, model(IMAGES))


def test_named_place_is_pooled_over_space(make_net: Any) -> None:
    model = make_net()
    features = PooledFeatures(model, at="2")(IMAGES)
    torch.testing.assert_close(features, model[:3](IMAGES).mean(dim=(2, 3)))


def test_named_place_may_be_written_over_by_the_next_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3600, 2))
    features = PooledFeatures(model, at="0")(IMAGES)
    torch.testing.assert_close(features, model[0](IMAGES).mean(dim=(2, 3)))
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU(inplace=True))
    torch.testing.assert_close(PooledFeatures(vectors, at="1")(IMAGES), vectors[:2](IMAGES))


def test_named_block_of_tokens_is_averaged_over_them() -> None:
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2).eval()
    features = PooledFeatures(model, at="norm")(IMAGES)
    torch.testing.assert_close(features, model.forward_features(IMAGES).mean(dim=1))


def test_gradient_is_that_of_the_plain_network(make_net: Any) -> None:
    model = make_net()
    twin = copy.deepcopy(model)
    PooledFeatures(model)(IMAGES).square().sum().backward()
    twin[:5](IMAGES).mean(dim=(2, 3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).grad
        if expected is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected)


def test_model_is_left_as_it_was(make_net: Any) -> None:
    model = nn.Sequential(*make_net()[:4], nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 3))
    model[4].eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        PooledFeatures(model.eval())(IMAGES)
    model.train()
    model[4].eval()
    PooledFeatures(model, at="3")(IMAGES)
    features = PooledFeatures(model)
    features(IMAGES)
    assert [module.training for module in model] == [True] * 4 + [False] + [True] * 3
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert features.model is model


def test_finding_the_place_does_not_touch_batch_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(4, 2))
    PooledFeatures(model)(IMAGES)
    assert model[1].num_batches_tracked == 1


def test_half_precision_features_are_float32(make_net: Any) -> None:
    model = make_net()
    with torch.autocast("cpu", torch.bfloat16):
        features = PooledFeatures(model)(IMAGES)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, PooledFeatures(model)(IMAGES), rtol=0.05, atol=0.05)


def test_unknown_place_is_refused_with_the_names_there_are(make_net: Any) -> None:
    with pytest.raises(ValueError, match=r"Sequential has no submodule at='layer3'; its children are 0, 1, 2"):
        PooledFeatures(make_net(), at="layer3")


def test_model_without_a_classifier_is_refused(make_net: Any) -> None:
    with pytest.raises(ValueError, match="Sequential has no classifier"):
        PooledFeatures(make_net()[:6])(IMAGES)


def test_linear_layer_on_tokens_is_no_classifier() -> None:
    with pytest.raises(ValueError, match="Sequential has no classifier"):
        PooledFeatures(nn.Sequential(nn.Flatten(2), nn.Linear(1024, 5)))(IMAGES)


def test_of_two_activations_with_one_output_the_last_counts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), nn.ReLU(), nn.ReLU(), nn.Linear(6, 2))
    torch.testing.assert_close(PooledFeatures(model)(IMAGES), model[:3](IMAGES))


def test_place_that_fires_twice_is_refused() -> None:
    relu = nn.ReLU()
    with pytest.raises(RuntimeError, match="at='1' fired 2 times"):
        PooledFeatures(nn.Sequential(nn.Conv2d(3, 4, 3), relu, relu), at="1")(IMAGES)


class Changing(Functional):
    """A network with an auxiliary activation in training only, as Inception's."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        if self.training:
            F.relu(x)
        return self.fc(F.relu(self.conv2(x)).mean(dim=(2, 3)))


def test_forward_that_differs_between_modes_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"called 3 activations, and 2 in the first forward.*at="):
        PooledFeatures(Changing())(IMAGES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_changes_no_place(make_net: Any, value: float) -> None:
    model = perturbed(make_net())
    broken = IMAGES.clone()
    broken[0, 0, 0, 0] = value
    features = PooledFeatures(model)
    assert not features(broken)[0].isfinite().all()
    torch.testing.assert_close(features(IMAGES), PooledFeatures(model)(IMAGES))


@pytest.mark.parametrize("images", [torch.full((2, 3, 32, 32), float("nan")), IMAGES[:0]], ids=["NaN", "empty"])
def test_a_first_batch_that_shows_no_place_is_refused_and_the_next_looked_at(make_net: Any, images: Tensor) -> None:
    model = make_net()
    features = PooledFeatures(model)
    with pytest.raises(ValueError, match=r"Sequential cannot be found from this batch: no image.*at=\.\.\."):
        features(images)
    torch.testing.assert_close(features(IMAGES), PooledFeatures(model)(IMAGES))
