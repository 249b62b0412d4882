"""The gate: the feature term of an image counts as far as its labels are fitted."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from sfr.labels.fitted import fitted, of_all_images

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


def test_frames_share_the_weight_of_their_video_and_all_images_the_mean_of_those_with_a_label() -> None:
    weights = torch.tensor([0.5, 1.0])
    assert of_all_images(weights, 6, folded=True).tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert of_all_images(weights, 6, folded=False).tolist() == [0.75] * 6
    assert of_all_images(weights, 5, folded=True).tolist() == [0.75] * 5


class Tagger(nn.Module):
    """Recurrent layers whose batch is the second axis, or the first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.LSTM(16, 16, batch_first=batch_first) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [7, 4], ids=["longer", "as long as the batch"])
def test_flattened_predictions_count_for_the_text_they_are_of(batch_first: bool, length: int, soft: bool) -> None:
    """One text of four is fitted, and most labels are to be ignored: as with the axes as they were."""
    model = sfr.SFRWrapper(Tagger(batch_first))
    model(torch.randn(4, 9, 16) if batch_first else torch.randn(9, 4, 16))  # which shows where the batch is
    texts = torch.randn(4, length, 16)
    target = torch.randint(5, (4, length))
    one_hot = F.one_hot(target, 5).float()
    target[1, 1:], target[2] = IGNORED, IGNORED
    found = []
    for flat in (True, False):
        criterion = sfr.SFRLoss(model)
        given = texts.clone().requires_grad_()
        if batch_first:
            logits = model(given) + 20 * one_hot * torch.tensor([1, 0, 0, 0])[:, None, None]
            labels = one_hot if soft else target
        else:
            logits = model(given.transpose(0, 1)) + 20 * one_hot.transpose(0, 1) * torch.tensor([1, 0, 0, 0])[:, None]
            labels = (one_hot if soft else target).transpose(0, 1)
        if flat:
            loss = criterion(logits.reshape(-1, 5), labels.reshape(-1, 5) if soft else labels.reshape(-1))
        elif batch_first:
            loss = criterion(logits.movedim(2, 1), labels.movedim(2, 1) if soft else labels)
        else:
            labels = labels.transpose(0, 1)
            loss = criterion(logits.permute(1, 2, 0), labels.movedim(2, 1) if soft else labels)
        found.append((criterion.last.feature, loss.detach(), *torch.autograd.grad(loss, given)))
    for flat_one, other in zip(*found, strict=True):
        torch.testing.assert_close(flat_one, other)


@pytest.mark.parametrize("picked", [slice(0, 3), slice(1, 3), [4, 0, 1, 2, 3]], ids=str)
def test_where_some_images_have_a_label_all_count_as_far_as_these_are_fitted(picked: Any) -> None:
    images, target = data()
    model = sfr.SFRWrapper(net())
    criterion, ungated = sfr.SFRLoss(model), sfr.SFRLoss(model, gate="none")
    ungated(model(images), target)
    logits = model(images)
    criterion(logits[picked], target[picked])
    mean = fitted(logits[picked], target[picked], IGNORED).mean()
    torch.testing.assert_close(criterion.last.feature, mean * ungated.last.feature)


@pytest.mark.parametrize("picked", [4, 7, 8, 10, 14, 21])
@pytest.mark.parametrize("batch_first", [True, False])
def test_where_some_tokens_have_a_label_all_texts_count_as_far_as_these_are_fitted(
    batch_first: bool, picked: int
) -> None:
    """As of masked tokens: of four texts of seven."""
    model = sfr.SFRWrapper(Tagger(batch_first))
    criterion, ungated = sfr.SFRLoss(model), sfr.SFRLoss(model, gate="none")
    texts = torch.randn(4, 7, 16) if batch_first else torch.randn(7, 4, 16)
    mask = (torch.randperm(28) < picked).view(texts.shape[:2])
    target = torch.randint(5, texts.shape[:2])
    found = []
    for each in (ungated, criterion):
        logits = model(texts)[mask]
        each(logits, target[mask])
        found.append(each.last.feature)
    expected = fitted(logits, target[mask], IGNORED).mean() * found[0]
    if picked != 4:  # of as many tokens as texts each is taken for that of its text, as the last token is
        torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("picked", [2, 5, 6])
def test_pixels_may_be_picked(picked: int) -> None:
    model = sfr.SFRWrapper(segmenter(), stages=["0", "2"])
    criterion, ungated = sfr.SFRLoss(model), sfr.SFRLoss(model, gate="none")
    images, target = torch.randn(2, 3, 16, 16), torch.randint(5, (2, 16, 16))
    mask = (torch.randperm(512) < picked + 1).view(2, 16, 16)
    found = []
    for each in (ungated, criterion):
        logits = model(images).permute(0, 2, 3, 1)[mask]
        each(logits, target[mask])
        found.append(each.last.feature)
    torch.testing.assert_close(found[1], fitted(logits, target[mask], IGNORED).mean() * found[0])


class Inside(Tagger):
    """Layers whose batch is the second axis, in a model whose batch is the first."""

    def __init__(self, flat: bool) -> None:
        super().__init__(batch_first=False)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x.transpose(0, 1)).transpose(0, 1)
        return logits.flatten(0, 1) if self.flat else logits


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's, of LSTMs
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("flat", [False, True], ids=["flattened by the user", "by the model"])
@pytest.mark.parametrize("length", [7, 4], ids=["longer", "as long as the batch"])
def test_layers_with_another_batch_axis_do_not_change_how_the_rows_lie(length: int, flat: bool, compiled: bool) -> None:
    model: Any = sfr.SFRWrapper(Inside(flat))
    criterion = sfr.SFRLoss(model)
    if compiled:
        model = torch.compile(model, backend="eager")
    for longer in (0, 1):  # than at the first forward, which shows what there is to know
        length += longer
        texts, target = torch.randn(4, length, 16, requires_grad=True), torch.randint(5, (4, length))
        logits = (
            model(texts).reshape(4, length, 5) + 20 * F.one_hot(target, 5) * torch.tensor([1, 0, 0, 0])[:, None, None]
        )
        feature = criterion(logits.reshape(-1, 5), target.reshape(-1)) - F.cross_entropy(
            logits.reshape(-1, 5), target.reshape(-1)
        )
        norms = torch.autograd.grad(feature, texts)[0].flatten(1).norm(dim=1)
        assert norms[1:].max() < 0.3 * norms[0]


def videos_of_which_the_second_is_fitted(x: Tensor, backbone: nn.Module, head: nn.Module) -> Tensor:
    each = backbone(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(dim=1)
    return head(each) + torch.tensor([[0.0], [40.0]]) * F.one_hot(torch.tensor([1, 2]), 5)


class Videos(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frames = net(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return videos_of_which_the_second_is_fitted(x, self.frames, self.head)


@pytest.mark.parametrize("where", ["inside", "compiled", "head outside"])
def test_a_model_of_videos_counts_each_by_its_own_label(where: str) -> None:
    """Three frames of each of two videos."""
    plain = Videos()
    if where == "head outside":
        backbone = sfr.SFRWrapper(plain.frames)
        criterion, model = (
            sfr.SFRLoss(backbone),
            lambda x: videos_of_which_the_second_is_fitted(x, backbone, plain.head),
        )
    else:
        wrapped = sfr.SFRWrapper(plain, stages=["frames.1", "frames.3"])
        criterion = sfr.SFRLoss(wrapped)
        model = torch.compile(wrapped, backend="eager") if where == "compiled" else wrapped
    for _ in range(2):
        videos = torch.randn(2, 3, 3, 16, 16, requires_grad=True)
        logits, target = model(videos), torch.tensor([1, 2])
        feature = criterion(logits, target) - F.cross_entropy(logits, target)
        first, second = torch.autograd.grad(feature, videos)[0].flatten(1).norm(dim=1)
        assert first < 0.2 * second


def test_a_part_of_the_batch_can_be_picked_of_a_compiled_model() -> None:
    images, target = data()
    model = sfr.SFRWrapper(net())
    criterion, compiled = sfr.SFRLoss(model), torch.compile(model, backend="eager")
    for _ in range(2):
        logits = compiled(images)[:4]
        criterion(logits, target[:4]).backward()
    assert criterion.last.feature > 0


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
