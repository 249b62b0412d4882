"""The gate: the feature term of an image counts as far as its labels are fitted."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from sfr.feature.results import Terms
from sfr.labels.fitted import fitted

IGNORED = -100


def net(head: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), head)


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (count,), generator=generator)


def test_class_indices_give_the_squared_probability_of_the_label() -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 4, 2, IGNORED])
    expected = [(math.exp(logits[i, y]) / logits[i].exp().sum().item()) ** 2 for i, y in enumerate([0, 4, 2])]
    torch.testing.assert_close(fitted(logits, target, IGNORED), torch.tensor([*expected, 1.0]))


def test_a_mixed_target_is_as_fitted_as_its_labels_are_in_their_shares() -> None:
    logits, first, second = torch.randn(4, 5), torch.tensor([0, 4, 2, 1]), torch.tensor([3, 4, 0, 2])
    mixed = 0.3 * F.one_hot(first, 5) + 0.7 * F.one_hot(second, 5)
    expected = 0.3 * fitted(logits, first, IGNORED) + 0.7 * fitted(logits, second, IGNORED)
    torch.testing.assert_close(fitted(logits, mixed, IGNORED), expected)


def test_of_an_image_with_many_labels_it_is_the_mean_over_those_that_count() -> None:
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    target[0, 0], target[1] = IGNORED, IGNORED
    values = [logits.softmax(1)[0, target[0, i, j], i, j] ** 2 for i in (1, 2) for j in range(4)]
    torch.testing.assert_close(
        fitted(logits, target, IGNORED), torch.stack([torch.stack(values).mean(), torch.tensor(1.0)])
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
def test_it_is_a_number_between_0_and_1_whatever_the_logits_are(value: float, soft: bool) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    logits[0, 0] = logits[1, 0] = value
    result = fitted(logits, F.one_hot(target, 5).float() if soft else target, IGNORED)
    assert ((result >= 0) & (result <= 1)).all()


def test_the_feature_term_is_the_mean_over_the_images_weighted_by_what_is_fitted() -> None:
    images, target = data()
    model = sfr.SFRWrapper(net())
    logits = model(images)
    weights = logits.detach().softmax(1)[torch.arange(6), target].square()
    gated, open_ = sfr.SFRLoss(model), sfr.SFRLoss(model, gate="none")
    loss = gated(logits, target)
    of_images = []
    for i in range(6):
        open_(model(images[i : i + 1]), target[i : i + 1])
        of_images.append(open_.last.feature)
    torch.testing.assert_close(gated.last.feature, (weights * torch.stack(of_images)).mean())
    torch.testing.assert_close(loss, F.cross_entropy(logits, target) + 0.25 * gated.last.feature)
    assert gated.last.feature < torch.stack(of_images).mean()


def test_no_gradient_flows_through_the_gate() -> None:
    images, target = data()
    head = net()[-1]
    model = sfr.SFRWrapper(net(head))
    sfr.SFRLoss(model)(model(images), target).backward()
    with_term = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    F.cross_entropy(model.unwrap()(images), target).backward()
    for ours, plain in zip(with_term, head.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.grad)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole() -> None:
    images, target = data(8)
    gradients = []
    for parts in (1, 4):
        model = sfr.SFRWrapper(net())
        criterion = sfr.SFRLoss(model)
        for x, y in zip(images.chunk(parts), target.chunk(parts), strict=True):
            (criterion(model(x), y) / parts).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-4, atol=1e-6)


def test_each_of_the_two_labels_of_a_mixed_image_opens_the_gate_by_itself() -> None:
    images, target = data()
    model = sfr.SFRWrapper(net())
    criterion = sfr.SFRLoss(model)
    logits, both = model(images), []
    for labels in (target, target.flip(0)):
        criterion(logits, labels)
        both.append(criterion.last.feature)
    for labels, feature in zip((target, target.flip(0)), both, strict=True):
        alone = sfr.SFRLoss(model)
        alone(model(images), labels)
        torch.testing.assert_close(feature, alone.last.feature)


def test_beside_a_loss_of_ones_own_and_with_none_the_term_counts_in_full() -> None:
    images, target = data()
    model = sfr.SFRWrapper(net())
    features = []
    for arguments in ({"label_loss": nn.CrossEntropyLoss()}, {"gate": "none"}, {}):
        criterion = sfr.SFRLoss(model, **arguments)
        criterion(model(images), target)
        features.append(criterion.last.feature)
    torch.testing.assert_close(features[0], features[1])
    assert features[2] < features[1]


@pytest.mark.parametrize(("weights", "expected"), [(2, [0.5, 0.5, 1.0, 1.0]), (8, [0.75, 0.25, 1.0, 0.0])])
def test_images_in_parts_or_several_in_one_share_their_weights(weights: int, expected: list[float]) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    given = torch.tensor([0.5, 1.0]) if weights == 2 else torch.tensor([1, 0.5, 0.5, 0, 1, 1, 0, 0])
    terms = Terms(["pair"], values[None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(terms.weighted(given), (values * torch.tensor(expected))[None])
    assert torch.equal(terms.weighted(None), values[None])


def segmenter() -> nn.Module:
    return net(nn.Sequential(nn.Conv2d(16, 5, 1), nn.Upsample(size=(16, 16))))


def mixed(images: Tensor, target: Tensor) -> Any:
    return images, (F.one_hot(target, 5) + F.one_hot(target.flip(0), 5)) / 2


@pytest.mark.parametrize("kind", ["segmentation", "soft", "empty"])
def test_it_trains_with_every_kind_of_label(kind: str) -> None:
    images, target = data(0 if kind == "empty" else 6)
    model = sfr.SFRWrapper(segmenter() if kind == "segmentation" else net(), stages=["0", "2"])
    if kind == "segmentation":
        target = torch.randint(5, (6, 16, 16))
    if kind == "soft":
        images, target = mixed(images, target)
    criterion = sfr.SFRLoss(model)
    loss = criterion(model(images), target)
    loss.backward()
    assert kind == "empty" or (loss.isfinite() and 0 < criterion.last.feature < 1)
