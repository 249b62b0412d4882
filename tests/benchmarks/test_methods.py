"""Each arm of the accuracy benchmark against a plain reference, and every arm in a run that is stopped and resumed."""

import copy
import io
import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from benchmarks.accuracy.cell import Cell, Schedule
from benchmarks.accuracy.methods import METHODS, build_arm, parse_arm
from benchmarks.accuracy.methods.arm import Arm, Task
from benchmarks.accuracy.methods.cutmix import mixed_batch, random_box
from benchmarks.accuracy.methods.self_feature import SelfFeature
from benchmarks.accuracy.training import CellRun
from benchmarks.common.data import Parts
from examples.common.data import Labelled
from examples.common.models import build_model

CLASSES, COUNT, BATCH = 5, 20, 6


class ThreeStages(nn.Module):
    """Maps of 4, 8 and 16 channels at 8x8, 4x4 and 2x2 cells; no batch-norm, so that a forward changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, padding=1), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU())
        self.fc = nn.Linear(16, CLASSES)

    def maps(self, images: Tensor) -> list[Tensor]:
        shallow = self.stage1(images)
        middle = self.stage2(shallow)
        return [shallow, middle, self.stage3(middle)]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.maps(images)[-1].mean(dim=(2, 3)))


@pytest.fixture
def task() -> Task:
    """Twelve epochs of two steps, without augmentation."""
    torch.manual_seed(1)
    model, pixels = ThreeStages(), torch.randn(COUNT, 3, 8, 8)
    labels = torch.randint(CLASSES, (COUNT,))
    return Task(model, lambda indices: pixels[indices], labels, CLASSES, epochs=12, epoch_steps=2)


def batch(number: int = 0) -> Tensor:
    return torch.arange(number * BATCH, (number + 1) * BATCH)


def logits_of(task: Task, indices: Tensor) -> Tensor:
    with torch.no_grad():
        return task.model(task.images(indices))


def softmax(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits.double().numpy() / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    rows = zip(softmax(logits), labels.tolist(), strict=True)
    return float(np.mean([-math.log(row[label]) for row, label in rows]))


def soft_cross_entropy(logits: Tensor, targets: np.ndarray) -> float:
    return float(-(targets * np.log(softmax(logits))).sum(axis=1).mean())


def kl(teacher: np.ndarray, predicted: np.ndarray) -> float:
    """KL(teacher || predicted), averaged over images."""
    total = 0.0
    for t_row, p_row in zip(teacher, predicted, strict=True):
        total += sum(t * math.log(t / p) for t, p in zip(t_row, p_row, strict=True))
    return total / len(teacher)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(task: Task, indices: Tensor) -> dict[str, Tensor]:
    return gradients(F.cross_entropy(task.model(task.images(indices)), task.labels[indices]), task.model)


# Names and options


def test_an_arm_is_built_with_the_options_in_its_name(task: Task) -> None:
    assert build_arm("ps-kd@alpha=0.5", task).alpha == 0.5
    arm = build_arm("tfd@weight=1,grouping=segments", task)
    assert (arm.weight, arm.grouping) == (1, "segments")
    assert parse_arm("sfr@weight=0.2,pairs=last") == ("sfr", {"weight": 0.2, "pairs": "last"})


def test_an_unknown_arm_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no arm is called 'vanila'; there are vanilla, .*dlb"):
        parse_arm("vanila@weight=1")


def test_an_option_without_a_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="'weight' is not key=value"):
        parse_arm("tfd@grouping=crop,weight")


def test_an_unknown_option_is_an_error(task: Task) -> None:
    with pytest.raises(TypeError, match="temperatur"):
        build_arm("cs-kd@temperatur=4", task)


# Label terms


def test_vanilla_and_label_smoothing(task: Task) -> None:
    logits, labels = logits_of(task, batch()), task.labels[batch()]
    assert build_arm("vanilla", task)(batch()).item() == pytest.approx(cross_entropy(logits, labels), rel=1e-5)
    targets = 0.9 * np.eye(CLASSES)[labels] + 0.1 / CLASSES
    assert build_arm("label-smoothing", task)(batch()).item() == pytest.approx(
        soft_cross_entropy(logits, targets), rel=1e-5
    )


@pytest.mark.parametrize(("options", "temperature"), [("", 20), ("@temperature=0.2", 0.2)])
def test_the_virtual_teacher_is_a_softened_99_per_cent(task: Task, options: str, temperature: float) -> None:
    logits, labels = logits_of(task, batch()), task.labels[batch()]
    teacher = []
    for label in labels.tolist():
        powers = [math.exp((0.99 if k == label else 0.01 / (CLASSES - 1)) / temperature) for k in range(CLASSES)]
        teacher.append([power / sum(powers) for power in powers])
    expected = 0.9 * cross_entropy(logits, labels) + 0.1 * kl(np.array(teacher), softmax(logits))
    assert build_arm("tf-kd-reg" + options, task)(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_online_label_smoothing_learns_from_the_correct_images_of_the_last_epoch(task: Task) -> None:
    arm = build_arm("online-label-smoothing", task)
    indices = torch.arange(COUNT)
    logits, labels = logits_of(task, indices), task.labels
    onehot = np.eye(CLASSES)[labels]
    first = arm(indices).item()
    assert first == pytest.approx(soft_cross_entropy(logits, 0.5 * onehot + 0.5 / CLASSES), rel=1e-5)
    assert arm(indices).item() == first  # nothing moves within an epoch
    arm.end_epoch()
    predicted, rows = softmax(logits), np.full((CLASSES, CLASSES), 1 / CLASSES)
    for label in range(CLASSES):
        correct = [p for p, y in zip(predicted, labels.tolist(), strict=True) if y == label == p.argmax()]
        if correct:
            rows[label] = np.mean(correct, axis=0)
    assert (rows != 1 / CLASSES).any()
    expected = soft_cross_entropy(logits, 0.5 * onehot + 0.5 * rows[labels])
    assert arm(indices).item() == pytest.approx(expected, rel=1e-5)


# Predictions of other images or of earlier


def test_cs_kd_learns_from_partners_and_not_through_them(task: Task) -> None:
    arm = build_arm("cs-kd@weight=0.7", task)
    partners = torch.tensor([7, 11, 2, 19, 4, 0])
    arm.partners = lambda indices: partners
    logits, taught = logits_of(task, batch()), logits_of(task, partners)
    divergence = kl(softmax(taught, 4), softmax(logits, 4))
    loss = arm(batch())
    expected = cross_entropy(logits, task.labels[batch()]) + 0.7 * 16 * divergence
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # By hand: the gradient of the same loss with the partners' logits as constants.
    again = task.model(task.images(batch()))
    by_hand = F.cross_entropy(again, task.labels[batch()]) + 0.7 * 16 * F.kl_div(
        (again / 4).log_softmax(dim=1), (taught / 4).softmax(dim=1), reduction="batchmean"
    )
    expected_gradients = gradients(by_hand, task.model)
    for name, gradient in gradients(loss, task.model).items():
        torch.testing.assert_close(gradient, expected_gradients[name])


def test_a_partner_is_any_image_of_the_class_and_drawn_apart_from_all_else(task: Task) -> None:
    arm, state = build_arm("cs-kd", task), torch.get_rng_state()
    seen: dict[int, set[int]] = {index: set() for index in range(COUNT)}
    for _ in range(200):
        for index, partner in enumerate(arm.partners(torch.arange(COUNT)).tolist()):
            seen[index].add(partner)
    for index, partners in seen.items():
        assert partners == set((task.labels == task.labels[index]).nonzero().flatten().tolist())
    assert torch.equal(torch.get_rng_state(), state)


def test_ps_kd_moves_the_targets_towards_what_was_said_an_epoch_ago(task: Task) -> None:
    arm = build_arm("ps-kd", task)
    logits, labels = logits_of(task, batch()), task.labels[batch()]
    onehot = np.eye(CLASSES)[labels]
    assert arm(batch()).item() == pytest.approx(cross_entropy(logits, labels), rel=1e-5)
    arm.end_epoch()
    with torch.no_grad():
        task.model.fc.weight.mul_(3)
    share = 0.8 * 2 / 12
    targets = (1 - share) * onehot + share * softmax(logits)
    loss = arm(batch())
    assert loss.item() == pytest.approx(soft_cross_entropy(logits_of(task, batch()), targets), rel=1e-5)
    torch.testing.assert_close(arm.predictions[batch()].double(), torch.tensor(softmax(logits_of(task, batch()))))
    torch.testing.assert_close(arm.predictions[batch(1)].double(), torch.eye(CLASSES).double()[task.labels[batch(1)]])
    assert not arm.predictions.requires_grad


def test_l2_sp_draws_all_weights_but_the_last_layers_to_where_they_started(task: Task) -> None:
    arm = build_arm("l2-sp@alpha=0.5,beta=0.25", task)
    start = copy.deepcopy(task.model)
    plain = build_arm("vanilla", task)
    size = sum(each.square().sum() for each in task.model.fc.parameters())
    assert arm(batch()).item() == pytest.approx((plain(batch()) + 0.125 * size).item(), rel=1e-5)
    with torch.no_grad():
        for each in task.model.parameters():
            each.add_(0.1 * torch.randn_like(each))
    away = sum((a - b).square().sum() for a, b in zip(task.model.parameters(), start.parameters(), strict=True))
    away -= sum((a - b).square().sum() for a, b in zip(task.model.fc.parameters(), start.fc.parameters(), strict=True))
    size = sum(each.square().sum() for each in task.model.fc.parameters())
    expected = plain(batch()) + 0.25 * away + 0.125 * size
    assert arm(batch()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert [name for name, _ in arm.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_elr_pushes_the_prediction_towards_the_mean_of_what_was_said(task: Task) -> None:
    arm = build_arm("elr", task)
    assert (arm.weight, arm.beta) == (3.0, 0.7)  # the authors', for ten classes and fewer
    labels, targets = task.labels[batch()], np.zeros((BATCH, CLASSES))
    for _ in range(3):
        logits = logits_of(task, batch())
        targets = 0.7 * targets + 0.3 * softmax(logits)
        agreement = (targets * softmax(logits)).sum(axis=1)
        expected = cross_entropy(logits, labels) + 3 * np.log(1 - agreement).mean()
        loss = arm(batch())
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            task.model.fc.weight.mul_(2)
    assert not arm.targets.requires_grad
    assert not arm.targets[batch(1)].any()

    logits = logits_of(task, batch()).double().requires_grad_()
    targets = torch.tensor(0.7 * targets + 0.3 * softmax(logits.detach()))
    (F.cross_entropy(logits, labels) + 3 * (1 - (targets * logits.softmax(1)).sum(1)).log().mean()).backward()
    arm(batch()).backward()
    torch.testing.assert_close(task.model.fc.bias.grad, logits.grad.sum(dim=0).float(), rtol=1e-4, atol=1e-6)


def test_sfr_with_past_predictions_is_ps_kd_and_the_feature_term(task: Task) -> None:
    theirs = build_arm("ps-kd", replace(task, model=copy.deepcopy(task.model)))
    theirs.epoch += task.epochs - 1  # from here on its alpha is 0.8
    ours = build_arm("sfr@smoothing=past,alpha=0.8,weight=0.5", task)
    for _ in range(3):
        loss, label = ours(batch()).item(), theirs(batch()).item()
        feature = ours.criterion.last.feature.item()
        assert feature > 0
        assert loss == pytest.approx(label + 0.5 * feature, rel=1e-3)
        for arm in (theirs, ours):
            with torch.no_grad():
                next(arm.model.parameters()).mul_(1.5)


def test_alpha_of_sfr_ends_with_the_run_unless_told_otherwise(task: Task) -> None:
    def alpha_of(options: str) -> float | sfr.Ramp | None:
        arm = build_arm(f"sfr@smoothing=class_mean,alpha_end=0.9{options}", task)
        assert isinstance(arm, SelfFeature)
        return arm.criterion.config.alpha

    assert alpha_of("") == sfr.Ramp(0.5, 0.9, steps=24)
    assert alpha_of(",alpha_steps=5") == sfr.Ramp(0.5, 0.9, steps=5)


def test_dlb_trains_on_the_last_batch_again_and_agrees_with_what_was_said_of_it(task: Task) -> None:
    arm = build_arm("dlb@alpha=0.5", task)
    said = logits_of(task, batch(0))
    assert arm(batch(0)).item() == pytest.approx(cross_entropy(said, task.labels[batch(0)]), rel=1e-5)
    with torch.no_grad():
        task.model.fc.weight.mul_(3)
    both = torch.cat([batch(0), batch(1)])
    again = logits_of(task, batch(0))
    divergence = kl(softmax(said, 3), softmax(again, 3))
    expected = cross_entropy(logits_of(task, both), task.labels[both]) + 0.5 * 9 * divergence
    assert arm(batch(1)).item() == pytest.approx(expected, rel=1e-5)
    last, logits = arm.last
    assert torch.equal(last, batch(1))
    assert not logits.requires_grad


# Features


def pooled(feature_map: np.ndarray, size: int) -> np.ndarray:
    """Average a square map (B, C, H, H) in blocks to (B, C, size, size)."""
    block = feature_map.shape[2] // size
    out = np.zeros((*feature_map.shape[:2], size, size))
    for row in range(size):
        for column in range(size):
            cut = feature_map[:, :, row * block : (row + 1) * block, column * block : (column + 1) * block]
            out[:, :, row, column] = cut.mean(axis=(2, 3))
    return out


def feature_distance(task: Task, indices: Tensor, grouping: str, max_grid: int) -> float:
    maps = [feature.detach().double().numpy() for feature in task.model.maps(task.images(indices))]
    distances = []
    for shallow, deep in combinations(maps, 2):
        size, channels = min(deep.shape[2], max_grid), shallow.shape[1]
        student, teacher = pooled(shallow, size), pooled(deep, size)
        groups = [teacher[:, start : start + channels] for start in range(0, teacher.shape[1], channels)]
        if grouping == "crop":
            groups = groups[:1]
        distances.append(np.mean([((student - group) ** 2).mean() for group in groups]))
    return float(np.mean(distances))


@pytest.mark.parametrize(
    ("options", "grouping", "max_grid"),
    [("", "crop", 99), (",grouping=segments", "segments", 99), (",max_grid=2", "crop", 2)],
)
def test_tfd_is_the_mean_squared_distance_over_all_pairs(
    task: Task, options: str, grouping: str, max_grid: int
) -> None:
    arm = build_arm("tfd@weight=3" + options, task)
    distance = feature_distance(task, batch(), grouping, max_grid)
    plain = cross_entropy(logits_of(task, batch()), task.labels[batch()])
    # A twelfth of the run, two steps of 24, is the warm-up.
    for share in (0.5, 1, 1):
        assert arm(batch()).item() == pytest.approx(plain + 3 * share * distance, rel=1e-5)


def test_the_published_weight_of_tfd_is_the_default(task: Task) -> None:
    assert build_arm("tfd", task).weight == 0.005


def test_the_deep_side_of_tfd_gets_no_gradient(task: Task) -> None:
    plain = plain_gradients(task, batch())
    with_features = gradients(build_arm("tfd@weight=10", task)(batch()), task.model)
    for name, gradient in with_features.items():
        deepest = name.startswith(("stage3", "fc"))
        assert torch.allclose(gradient, plain[name]) == deepest, name


def test_byot_is_the_sum_over_the_classifiers_of_the_shallow_stages(task: Task) -> None:
    arm = build_arm("byot@alpha=0.4,beta=2", task)
    labels, logits = task.labels[batch()], logits_of(task, batch())
    with torch.no_grad():
        *shallow, deepest = task.model.maps(task.images(batch()))
        outputs = [head(feature_map) for head, feature_map in zip(arm.heads, shallow, strict=True)]
    taught = deepest.double().numpy().mean(axis=(2, 3))
    expected = cross_entropy(logits, labels)
    for feature, prediction in outputs:
        expected += 0.6 * cross_entropy(prediction, labels)
        expected += 0.4 * kl(softmax(logits, 3), softmax(prediction, 3))
        expected += 2 * ((feature.double().numpy() - taught) ** 2).mean()
    assert len(outputs) == 2
    assert arm(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_byot_teaches_the_shallow_stages_and_its_heads_alone(task: Task) -> None:
    plain = plain_gradients(task, batch())
    arm = build_arm("byot@beta=1", task)
    for name, gradient in gradients(arm(batch()), task.model).items():
        assert torch.allclose(gradient, plain[name]) == name.startswith(("stage3", "fc")), name
    assert all(parameter.grad is not None for parameter in arm.heads.parameters())


@pytest.mark.parametrize(("name", "channels"), [("resnet8", [16, 32, 64]), ("resnet18", [64, 128, 256, 512])])
def test_byot_finds_the_stages_and_leaves_the_run_as_it_is(name: str, channels: list[int]) -> None:
    def drawn_after(arm: str) -> tuple[Arm, Tensor]:
        torch.manual_seed(0)
        task = Task(build_model(name, CLASSES), None, torch.zeros(1, dtype=torch.long), CLASSES, 1, 1)
        return build_arm(arm, task), torch.rand(3)

    (arm, drawn), (vanilla, expected) = drawn_after("byot"), drawn_after("vanilla")
    assert torch.equal(drawn, expected)
    state = arm.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vanilla.model.state_dict().items())
    assert arm.model.training
    assert [head.bottleneck[0].in_channels for head in arm.heads] == channels[:-1]
    assert {head.classifier.in_features for head in arm.heads} == {channels[-1]}
    sizes = [head.bottleneck[3].kernel_size[0] for head in arm.heads]
    assert sizes == [2**k for k in range(len(channels) - 1, 0, -1)]


# CutMix


def test_cutmix_pastes_a_patch_of_another_image_and_mixes_the_labels_by_its_area(task: Task) -> None:
    plain, generator = task.images(batch()), torch.Generator().manual_seed(3)
    onehot = torch.eye(CLASSES)[task.labels[batch()]]
    shares = set()
    for _ in range(20):
        images, targets = mixed_batch(task, batch(), 1.0, generator)
        foreign = (images != plain).all(dim=1)
        for k in range(BATCH):
            others = [j for j in range(BATCH) if torch.equal(images[k][:, foreign[k]], plain[j][:, foreign[k]])]
            share = foreign[k].double().mean().item()
            shares.add(round(share, 3))
            mixtures = [(1 - share) * onehot[k] + share * onehot[j] for j in others]
            assert any(torch.allclose(targets[k], mixture) for mixture in mixtures)
    assert len(shares) > 5


def test_the_patch_of_cutmix_is_as_large_as_its_law_says() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = np.array([random_box(64, 64, generator) for _ in range(4000)])
    sides = boxes[:, 1::2] - boxes[:, ::2]
    assert boxes.min() == 0
    assert boxes.max() == 64
    # Where nothing is cut off both sides are the same; 1 - lambda is uniform, of mean a half, before the cut.
    inside = (boxes[:, ::2] > 0).all(axis=1) & (boxes[:, 1::2] < 64).all(axis=1)
    assert (sides[inside, 0] == sides[inside, 1]).all()
    # By quadrature: the expected share of a square of side s, its centre uniform, clipped at the image's border.
    s = np.sqrt(np.linspace(0, 1, 10001))
    expected = ((s - s**2 / 4) ** 2).mean()
    assert (sides.prod(axis=1) / 64**2).mean() == pytest.approx(expected, abs=0.015)


def test_cutmix_with_probability_zero_is_vanilla_and_half_of_the_batches_are_mixed(task: Task) -> None:
    vanilla = build_arm("vanilla", task)(batch()).item()
    assert build_arm("cutmix@probability=0", task)(batch()).item() == pytest.approx(vanilla)
    arm = build_arm("cutmix", task)
    untouched = sum(abs(arm(batch()).item() - vanilla) < 1e-6 for _ in range(200))
    assert 70 < untouched < 130


def test_sfr_cutmix_is_sfr_on_mixed_images(task: Task) -> None:
    arm, same_draws = build_arm("sfr-cutmix@probability=1,feature_weight=0.5", task), torch.Generator()
    same_draws.set_state(arm.draws.generator.get_state())
    loss = arm(batch()).item()
    images, targets = mixed_batch(task, batch(), 1.0, same_draws)
    model = sfr.SFRWrapper(copy.deepcopy(arm.model.unwrap()))
    criterion = sfr.SFRLoss(model, arm.criterion.config)
    assert criterion.config.feature_weight == 0.5
    assert loss == pytest.approx(criterion(model(images), targets).item())
    assert criterion.last.feature > 0
    assert loss != pytest.approx(F.cross_entropy(logits_of(task, batch()), task.labels[batch()]).item())


# Gates in the label term


def gated(task: Task, gate: str) -> Arm:
    return build_arm(f"sfr-gated@gate={gate},weight=0,smoothing=class_mean,alpha=0.4", task)


def label_loss(logits: Tensor, labels: Tensor, means: np.ndarray, alpha: list[float]) -> float:
    targets = [
        (1 - share) * np.eye(CLASSES)[label] + share * means[label]
        for label, share in zip(labels.tolist(), alpha, strict=True)
    ]
    return soft_cross_entropy(logits, np.array(targets))


@pytest.fixture
def half_known(task: Task) -> list[bool]:
    """Give the first half of the batch the labels that the network says, and the other half others."""
    said = logits_of(task, batch()).argmax(dim=1)
    known = [place < BATCH // 2 for place in range(BATCH)]
    task.labels[batch()] = torch.where(torch.tensor(known), said, (said + 1) % CLASSES)
    return known


def means_of_correct(task: Task, known: list[bool]) -> np.ndarray:
    labels, said = task.labels[batch()].tolist(), softmax(logits_of(task, batch()))
    means = np.full((CLASSES, CLASSES), 1 / CLASSES)
    for label in set(labels):
        rows = [said[place] for place in range(BATCH) if known[place] and labels[place] == label]
        means[label] = np.mean(rows, axis=0) if rows else means[label]
    return means


def test_the_gate_of_a_class_opens_with_the_share_of_it_that_is_known(task: Task, half_known: list[bool]) -> None:
    arm, labels = gated(task, "class"), task.labels[batch()].tolist()
    logits = logits_of(task, batch())
    assert arm(batch()).item() == pytest.approx(cross_entropy(logits, task.labels[batch()]), rel=1e-5)  # none is known
    shares = []
    for label in labels:
        of_class = [known for known, other in zip(half_known, labels, strict=True) if other == label]
        shares.append((1 - 0.98 ** len(of_class)) * sum(of_class) / len(of_class))
    expected = label_loss(
        logits, task.labels[batch()], means_of_correct(task, half_known), [0.4 * share for share in shares]
    )
    assert any(shares)
    assert arm(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_the_gate_of_a_sample_is_open_if_it_is_known(task: Task, half_known: list[bool]) -> None:
    arm, logits = gated(task, "sample"), logits_of(task, batch())
    alpha = [0.4 * known for known in half_known]
    for means in (np.full((CLASSES, CLASSES), 1 / CLASSES), means_of_correct(task, half_known)):
        expected = label_loss(logits, task.labels[batch()], means, alpha)
        assert arm(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_a_sample_that_is_not_known_counts_as_its_label(task: Task, half_known: list[bool]) -> None:
    arm, logits, labels = gated(task, "onehot"), logits_of(task, batch()), task.labels[batch()]
    assert arm(batch()).item() == pytest.approx(cross_entropy(logits, labels), rel=1e-5)
    said, means = softmax(logits), np.eye(CLASSES)
    for label in set(labels.tolist()):
        places = [place for place in range(BATCH) if labels[place] == label]
        means[label] = np.mean([said[place] if half_known[place] else np.eye(CLASSES)[label] for place in places], 0)
    expected = label_loss(logits, labels, means, [0.4] * BATCH)
    assert expected != pytest.approx(cross_entropy(logits, labels))
    assert arm(batch()).item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_gate_is_an_error(task: Task) -> None:
    with pytest.raises(ValueError, match="gate must be one of class, sample, onehot; got 'clas'"):
        gated(task, "clas")


# A slow supervisor


def test_the_slow_supervisor_is_the_feature_term_between_the_network_and_its_average(task: Task) -> None:
    same, slow = (copy.deepcopy(task.model) for _ in range(2))
    arm, cost = build_arm("sfr-slow@decay=0.75,weight=0.5,smoothing=none", task), sfr.SFRConfig().cost
    with_itself = build_arm("sfr@weight=0.5,smoothing=none", replace(task, model=same))
    assert arm(batch()).item() == pytest.approx(with_itself(batch()).item())  # before any step the two are the same
    with torch.no_grad():
        for own, average in zip(task.model.parameters(), slow.parameters(), strict=True):
            own.mul_(2)
            average.lerp_(own, 1 - 2 / 11)  # the second step: the average is young and follows fast
    maps = [net.maps(task.images(batch())) for net in (task.model, slow)]
    terms = []
    for i, j in combinations(range(3), 2):
        shallow, deep = maps[0][i], maps[1][j].detach()
        size, channels = min(deep.shape[2], 4), shallow.shape[1]
        nodes = [F.adaptive_avg_pool2d(feature, size).flatten(2).transpose(1, 2) for feature in (shallow, deep)]
        terms.append(sfr.emd_l2(nodes[0], nodes[1].unflatten(2, (-1, channels)).mean(dim=2), cost=cost))
    plain = F.cross_entropy(task.model(task.images(batch())), task.labels[batch()])
    expected = plain + 0.5 * torch.stack(terms).mean()
    loss = arm(batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradients = gradients(expected, task.model)
    for name, gradient in gradients(loss, task.model).items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    assert all(parameter.grad is None for parameter in arm.average.parameters())


@pytest.mark.parametrize(("options", "steps"), [("", 100), (",rising=False", 0)])
def test_the_average_keeps_its_pace_once_it_is_old_or_from_the_beginning(task: Task, options: str, steps: int) -> None:
    arm = build_arm(f"sfr-slow@decay=0.5{options}", task)
    arm.steps += steps
    before = [parameter.clone() for parameter in arm.average.parameters()]
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1)
    arm(batch())
    for old, new in zip(before, arm.average.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.5)


# In the harness


@pytest.fixture(scope="module")
def parts() -> Parts:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 3, 32, 32), generator=draw, dtype=torch.uint8)
    data = Labelled(pixels, torch.arange(48) % 10)
    return Parts(data, data.take(torch.arange(10)))


SCHEDULE = Schedule(epochs=2, batch_size=16, image_size=16, precision="fp32")  # bfloat16 is slow on many CPUs


def cell_run(arm: str, parts: Parts, schedule: Schedule = SCHEDULE) -> CellRun:
    return CellRun(Cell(arm, 0, "test", "tiny", "resnet8", "cifar10"), schedule, parts, torch.device("cpu"))


@pytest.mark.parametrize("arm", METHODS)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_was_not(arm: str, parts: Parts) -> None:
    run = cell_run(arm, parts)
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train_epoch()
    saved = io.BytesIO()
    torch.save(run.state(), saved)
    run.train_epoch()
    saved.seek(0)
    resumed = cell_run(arm, parts)
    resumed.restore(torch.load(saved))
    resumed.train_epoch()
    assert resumed.curve == run.curve
    assert all(math.isfinite(epoch["loss"]) for epoch in run.curve)
    trained, again = run.model.state_dict(), resumed.model.state_dict()
    assert not torch.equal(trained["conv1.weight"], start["conv1.weight"])
    for key, value in trained.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("arm", ["byot", "tfd", "sfr", "sfr-slow"])  # those that look into the network
def test_a_compiled_network_as_on_a_gpu_trains_like_a_plain_one_and_in_one_graph(arm: str, parts: Parts) -> None:
    torch._dynamo.reset()
    schedule = replace(SCHEDULE, precision="bf16")
    plain, compiled, graphs = cell_run(arm, parts, schedule), cell_run(arm, parts, schedule), []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled.model.compile(backend=keep)
    for run in (plain, compiled):
        run.train_epoch()
    assert compiled.curve == plain.curve
    assert len(graphs) == 1
    theirs = compiled.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in plain.model.state_dict().items())


@pytest.mark.parametrize("arm", METHODS)
def test_all_arms_start_from_the_same_weights_and_see_the_images_in_the_same_order(arm: str, parts: Parts) -> None:
    run, vanilla = cell_run(arm, parts), cell_run("vanilla", parts)
    state = run.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vanilla.model.state_dict().items())
    run.train_epoch()
    vanilla.train_epoch()
    assert torch.equal(run.order.get_state(), vanilla.order.get_state())
    assert torch.equal(run.state()["generators"][2], vanilla.state()["generators"][2])


def test_vanilla_longer_trains_for_more_epochs_and_ends_its_schedule_with_them(parts: Parts) -> None:
    run = cell_run("vanilla-longer@factor=1.5", parts, replace(SCHEDULE, epochs=2))
    rates = []
    for _ in range(run.epochs):
        run.train_epoch()
        rates.append(run.learning_rate.get_last_lr()[0])
    assert len(rates) == 3
    assert all(earlier > later for earlier, later in pairwise(rates))
    assert rates[1] > 0
    assert rates[2] == pytest.approx(0, abs=1e-9)
    assert cell_run("vanilla-longer", parts, replace(SCHEDULE, epochs=60)).epochs == 63
    assert cell_run("vanilla", parts, replace(SCHEDULE, epochs=60)).epochs == 60
