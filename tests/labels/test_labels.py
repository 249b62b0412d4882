"""Dynamic label smoothing: targets and class means against plain loops, its equalities with cross-entropy, resuming."""

import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_ranks
from torch import Tensor

from sfr.config import Ramp
from sfr.labels import DynamicLabelSmoothing, smooth_labels

CLASSES = 4
both_updates = pytest.mark.parametrize("update", ["running", "epoch"])
both_targets = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def distributions(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def batch(size: int, seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits of which about two thirds are correct, and their class indices."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (size,), generator=generator)
    logits = torch.randn(size, classes, generator=generator) + F.one_hot(target, classes)
    return logits, target


def targets(soft: bool, size: int = 6) -> Tensor:
    return distributions(size, CLASSES, seed=9) if soft else batch(size, seed=9)[1]


def correct_samples(logits: Tensor, target: Tensor) -> list[tuple[int, list[float]]]:
    """Class and softmax of each correctly classified sample."""
    samples = []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        exponentials = [math.exp(value) for value in row]
        if max(range(len(row)), key=lambda k: row[k]) == label:
            samples.append((label, [value / sum(exponentials) for value in exponentials]))
    return samples


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def uniform_rows(classes: int = CLASSES) -> list[list[float]]:
    return [[1.0 / classes] * classes for _ in range(classes)]


def reference_loss(logits: Tensor, target: Tensor, means: list[list[float]], alpha: float) -> float:
    """Cross-entropy against hard targets smoothed by the rows of `means`, with explicit loops."""
    total = 0.0
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for k, value in enumerate(row):
            share = (1 - alpha) * (1.0 if k == label else 0.0) + alpha * means[label][k]
            total -= share * (value - log_sum)
    return total / len(logits)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smoothed_hard_targets_are_those_of_explicit_loops(alpha: float) -> None:
    means, target = distributions(CLASSES, CLASSES), torch.tensor([2, 0, 3, 2])
    expected = torch.zeros(4, CLASSES)
    for i in range(4):
        for k in range(CLASSES):
            onehot = 1.0 if k == target[i] else 0.0
            expected[i, k] = (1 - alpha) * onehot + alpha * means[target[i], k]
    torch.testing.assert_close(smooth_labels(target, means, alpha), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smoothed_soft_targets_are_those_of_explicit_loops(alpha: float) -> None:
    means, target = distributions(CLASSES, CLASSES), distributions(3, CLASSES, seed=1)
    expected = torch.zeros(3, CLASSES)
    for i in range(3):
        for k in range(CLASSES):
            mixed = sum(target[i, j].item() * means[j, k].item() for j in range(CLASSES))
            expected[i, k] = (1 - alpha) * target[i, k] + alpha * mixed
    torch.testing.assert_close(smooth_labels(target, means, alpha), expected)


@both_targets
def test_smoothed_targets_sum_to_one(soft: bool) -> None:
    smoothed = smooth_labels(targets(soft), distributions(CLASSES, CLASSES), 0.4)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.ones(6))


def test_alpha_zero_leaves_the_one_hot_target() -> None:
    target = torch.tensor([2, 0, 3])
    expected = F.one_hot(target, CLASSES).float()
    assert torch.equal(smooth_labels(target, distributions(CLASSES, CLASSES), 0.0), expected)


def test_alpha_one_gives_the_rows_of_the_distributions() -> None:
    means, target = distributions(CLASSES, CLASSES), torch.tensor([2, 0, 3])
    assert torch.equal(smooth_labels(target, means, 1.0), means[target])


def test_one_hot_soft_targets_are_smoothed_as_hard_ones() -> None:
    means, target = distributions(CLASSES, CLASSES), torch.tensor([2, 0, 3])
    soft = smooth_labels(F.one_hot(target, CLASSES).float(), means, 0.3)
    torch.testing.assert_close(soft, smooth_labels(target, means, 0.3))


@both_targets
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_uniform_mode_has_the_value_of_pytorchs_label_smoothing(soft: bool, alpha: float) -> None:
    logits, target = batch(6, seed=1)[0], targets(soft)
    loss = DynamicLabelSmoothing("uniform", alpha=alpha)(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=alpha))


@both_targets
def test_uniform_mode_has_the_gradient_of_pytorchs_label_smoothing(soft: bool) -> None:
    logits, target = batch(6, seed=1)[0].requires_grad_(), targets(soft)
    (gradient,) = torch.autograd.grad(DynamicLabelSmoothing("uniform", alpha=0.2)(logits, target), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target, label_smoothing=0.2), logits)
    torch.testing.assert_close(gradient, expected)


def test_class_mean_mode_smooths_uniformly_before_any_class_is_seen() -> None:
    logits, target = batch(6, seed=1)
    loss = DynamicLabelSmoothing("class_mean", alpha=0.2)(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.2))


@both_targets
def test_none_mode_is_cross_entropy_bit_for_bit(soft: bool) -> None:
    logits, target = batch(6, seed=1)[0], targets(soft)
    assert torch.equal(DynamicLabelSmoothing("none")(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("after", [0, 2])
def test_a_ramp_of_alpha_moves_it_from_step_to_step(after: int) -> None:
    ramped = DynamicLabelSmoothing(alpha=Ramp(0.1, 0.9, steps=4, after=after))
    alphas = []
    for step in range(after + 6):
        logits, target = batch(6, seed=step)
        alphas.append(ramped.current_alpha())
        before = ramped.distributions if step else torch.full((CLASSES, CLASSES), 1 / CLASSES)
        expected = F.cross_entropy(logits, smooth_labels(target, before.clone(), alphas[-1]))
        torch.testing.assert_close(ramped(logits, target), expected)
    assert alphas == pytest.approx([0.1] * after + [0.1, 0.3, 0.5, 0.7, 0.9, 0.9])
    assert ramped.current_alpha() == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": Ramp(0, 2, steps=3)}, r"the end of the ramp must lie in \[0, 1\]; got 2"),
        ({"mode": "none", "alpha": Ramp(0, 0.5, steps=3)}, "without effect with mode='none', leave out: alpha"),
    ],
)
def test_a_ramp_of_alpha_that_cannot_be_is_an_error_that_says_why(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLabelSmoothing(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "none", "alpha": 0.3}, "alpha (of mode='class_mean' or 'past' or 'uniform')"),
        ({"mode": "none", "alpha": Ramp(0, 0.3, steps=5)}, "alpha (of mode="),
        ({"mode": "uniform", "momentum": 0.1}, "momentum (of mode='class_mean' or 'past')"),
        ({"mode": "past", "num_samples": 4, "update": "epoch"}, "update (of mode='class_mean')"),
    ],
)
def test_options_without_effect_are_errors_that_name_them(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"without effect.*{re.escape(named)}"):
        DynamicLabelSmoothing(**options)


def test_class_mean_mode_with_alpha_zero_is_cross_entropy_bit_for_bit() -> None:
    logits, target = batch(6, seed=1)
    assert torch.equal(DynamicLabelSmoothing(alpha=0.0)(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize(("mode", "alpha"), [("class_mean", 0.5), ("uniform", 0.1), ("none", 0.0)])
def test_default_alpha_of_each_mode(mode: Any, alpha: float) -> None:
    assert DynamicLabelSmoothing(mode).current_alpha() == alpha


@pytest.mark.parametrize(("alpha", "alpha_end"), [(0.0, 0.4), (0.4, 0.0), (0.2, 0.2), (0.0, 1.0)])
def test_alpha_moves_linearly_to_its_end_and_stays(alpha: float, alpha_end: float) -> None:
    criterion = DynamicLabelSmoothing("uniform", alpha=Ramp(alpha, alpha_end, steps=4))
    logits, target = batch(6, seed=1)
    for step in range(7):
        expected = alpha + (alpha_end - alpha) * min(step, 4) / 4
        reference = F.cross_entropy(logits, target, label_smoothing=expected)
        torch.testing.assert_close(criterion(logits, target), reference)


def test_alpha_without_an_end_stays() -> None:
    criterion = DynamicLabelSmoothing("uniform", alpha=0.3)
    for _ in range(3):
        criterion(*batch(6, seed=1))
    assert criterion.current_alpha() == 0.3


def test_evaluation_does_not_move_alpha() -> None:
    criterion = DynamicLabelSmoothing("uniform", alpha=Ramp(0.0, 0.4, steps=4)).eval()
    criterion(*batch(6, seed=1))
    assert criterion.current_alpha() == 0.0


def move_means(means: list[list[float]], seen: list[int], samples: Any, momentum: float) -> None:
    """Move the running class means by each sample, in place."""
    for label, probabilities in samples:
        seen[label] += 1
        weight = max(momentum, 1.0 / seen[label])
        for k in range(CLASSES):
            means[label][k] += weight * (probabilities[k] - means[label][k])


def test_running_class_mean_moves_by_each_sample_as_documented() -> None:
    """A plain mean of the first 1/momentum correct samples of a class, an exponential mean from there."""
    criterion = DynamicLabelSmoothing(momentum=0.25, update="running")
    means, seen = uniform_rows(), [0] * CLASSES
    for step in range(60):
        logits, target = batch(1, seed=step)
        criterion(logits, target)
        move_means(means, seen, correct_samples(logits, target), momentum=0.25)
        torch.testing.assert_close(criterion.distributions, torch.tensor(means))
    assert max(seen) > 4  # the exponential part was reached


def test_running_class_mean_is_the_plain_mean_of_the_first_correct_samples() -> None:
    criterion = DynamicLabelSmoothing(momentum=0.01, update="running")
    collected: list[list[list[float]]] = [[] for _ in range(CLASSES)]
    for step in range(6):
        logits, target = batch(8, seed=step)
        criterion(logits, target)
        for label, probabilities in correct_samples(logits, target):
            collected[label].append(probabilities)
        expected = [mean_of(rows) if rows else [1 / CLASSES] * CLASSES for rows in collected]
        torch.testing.assert_close(criterion.distributions, torch.tensor(expected))


def test_running_class_mean_keeps_the_share_that_n_samples_leave_once_exponential() -> None:
    criterion = DynamicLabelSmoothing(momentum=0.5, update="running")
    for step in range(10):
        criterion(*batch(8, seed=step))
    means = criterion.distributions.tolist()
    logits, target = batch(8, seed=99)
    criterion(logits, target)
    for label in range(CLASSES):
        rows = [probabilities for member, probabilities in correct_samples(logits, target) if member == label]
        if rows:
            kept = 0.5 ** len(rows)
            means[label] = [kept * old + (1 - kept) * new for old, new in zip(means[label], mean_of(rows), strict=True)]
    torch.testing.assert_close(criterion.distributions, torch.tensor(means))


def test_running_loss_is_that_of_explicit_loops_with_the_means_from_before_the_step() -> None:
    criterion = DynamicLabelSmoothing(alpha=0.4, momentum=0.01, update="running")
    collected: list[list[list[float]]] = [[] for _ in range(CLASSES)]
    for step in range(6):
        logits, target = batch(8, seed=step)
        means = [mean_of(rows) if rows else [1 / CLASSES] * CLASSES for rows in collected]
        assert float(criterion(logits, target)) == pytest.approx(reference_loss(logits, target, means, 0.4), rel=1e-5)
        for label, probabilities in correct_samples(logits, target):
            collected[label].append(probabilities)


def test_epoch_loss_is_that_of_explicit_loops_with_the_means_of_the_epoch_before() -> None:
    criterion = DynamicLabelSmoothing(alpha=0.4, update="epoch")
    means = uniform_rows()
    for epoch in range(3):
        collected: list[list[list[float]]] = [[] for _ in range(CLASSES)]
        for step in range(3):
            logits, target = batch(6, seed=10 * epoch + step)
            expected = reference_loss(logits, target, means, 0.4)
            assert float(criterion(logits, target)) == pytest.approx(expected, rel=1e-5)
            for label, probabilities in correct_samples(logits, target):
                collected[label].append(probabilities)
        criterion.end_epoch()
        means = [mean_of(rows) if rows else old for rows, old in zip(collected, means, strict=True)]


def test_epoch_means_are_those_of_the_last_epoch_only() -> None:
    criterion = DynamicLabelSmoothing(update="epoch")
    criterion(*batch(40, seed=1))
    criterion.end_epoch()
    logits, target = batch(40, seed=2)
    criterion(logits, target)
    criterion.end_epoch()
    for label in range(CLASSES):
        rows = [probabilities for member, probabilities in correct_samples(logits, target) if member == label]
        torch.testing.assert_close(criterion.distributions[label], torch.tensor(mean_of(rows)))


def test_epoch_means_stay_uniform_for_a_class_never_correct() -> None:
    criterion = DynamicLabelSmoothing(update="epoch")
    criterion(torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    criterion.end_epoch()
    torch.testing.assert_close(criterion.distributions[1:], torch.full((2, 3), 1 / 3))


def test_epoch_means_of_a_class_not_seen_again_stay() -> None:
    criterion = DynamicLabelSmoothing(update="epoch")
    criterion(torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([0]))
    criterion.end_epoch()
    first = criterion.distributions[0].clone()
    criterion(torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([1]))
    criterion.end_epoch()
    assert torch.equal(criterion.distributions[0], first)


def test_epoch_means_do_not_move_before_the_end_of_the_epoch() -> None:
    criterion = DynamicLabelSmoothing(update="epoch")
    for step in range(3):
        criterion(*batch(8, seed=step))
    assert torch.equal(criterion.distributions, torch.full((CLASSES, CLASSES), 1 / CLASSES))


@both_updates
def test_class_means_sum_to_one(update: Any) -> None:
    criterion = DynamicLabelSmoothing(momentum=0.1, update=update)
    for step in range(20):
        criterion(*batch(16, seed=step))
    if update == "epoch":
        criterion.end_epoch()
    torch.testing.assert_close(criterion.distributions.sum(dim=1), torch.ones(CLASSES))


def test_only_correct_samples_count() -> None:
    criterion = DynamicLabelSmoothing()
    criterion(torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]), torch.tensor([1, 2]))
    assert torch.equal(criterion.distributions, torch.full((3, 3), 1 / 3))


@both_updates
def test_soft_targets_are_left_as_they_are_but_counted_unless_alpha_is_given(update: Any) -> None:
    logits, target = batch(20, seed=1)[0].requires_grad_(), targets(soft=True, size=20)
    default, given = DynamicLabelSmoothing(update=update), DynamicLabelSmoothing(update=update, alpha=0.5)
    for _ in range(2):
        expected = F.cross_entropy(logits, target)
        loss, smoothed = default(logits, target), given(logits, target)
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))
        assert not torch.isclose(smoothed, expected)
    assert default.counts.sum() > 0
    assert torch.equal(default.counts, given.counts)
    assert torch.equal(default.distributions, given.distributions)


def test_a_moving_alpha_smooths_soft_targets() -> None:
    logits, target = batch(6, seed=1)[0], targets(soft=True)
    loss = DynamicLabelSmoothing(alpha=Ramp(0.5, 0.0, steps=10))(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.5))


def test_class_indices_are_smoothed_between_soft_targets() -> None:
    criterion, (logits, target) = DynamicLabelSmoothing(), batch(6, seed=1)
    criterion(batch(6, seed=2)[0], targets(soft=True))
    expected = smooth_labels(target, criterion.distributions, 0.5)
    torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, expected))


def test_soft_target_counts_for_its_largest_class() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    criterion = DynamicLabelSmoothing()
    criterion(logits, torch.tensor([[0.3, 0.6, 0.1]]))
    torch.testing.assert_close(criterion.distributions[1], logits[0].softmax(dim=0))


def test_soft_targets_mix_the_class_means_in_their_proportions() -> None:
    criterion = DynamicLabelSmoothing(alpha=0.4)
    criterion(*batch(20, seed=1))
    means, logits, target = criterion.distributions.clone(), batch(6, seed=2)[0], targets(soft=True)
    expected = 0.0
    for i in range(6):
        log_probabilities = logits[i].log_softmax(dim=0)
        for k in range(CLASSES):
            mixed = sum(target[i, j].item() * means[j, k].item() for j in range(CLASSES))
            expected -= (0.6 * target[i, k].item() + 0.4 * mixed) * log_probabilities[k].item() / 6
    assert float(criterion(logits, target)) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_prediction_minus_target_and_passes_no_class_mean() -> None:
    criterion = DynamicLabelSmoothing(alpha=0.4)
    criterion(*batch(20, seed=1))
    means = criterion.distributions.clone()
    logits, target = batch(6, seed=2)
    logits.requires_grad_()
    criterion(logits, target).backward()
    expected = torch.zeros(6, CLASSES)
    for i in range(6):
        for k in range(CLASSES):
            share = 0.6 * (1.0 if k == target[i] else 0.0) + 0.4 * means[target[i], k]
            expected[i, k] = (logits[i].detach().softmax(dim=0)[k] - share) / 6
    torch.testing.assert_close(logits.grad, expected)


@both_updates
def test_statistics_carry_no_graph(update: Any) -> None:
    criterion = DynamicLabelSmoothing(update=update)
    logits, target = batch(6, seed=2)
    criterion(logits.requires_grad_(), target)
    assert not any(state.requires_grad for state in (criterion.distributions, criterion.sums, criterion.counts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_mean_loss_of_half_precision_logits_is_float32(dtype: torch.dtype) -> None:
    logits, target = batch(6, seed=1)
    assert DynamicLabelSmoothing()(logits.to(dtype), target).dtype == torch.float32


@both_updates
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_not_finite_do_not_reach_the_class_means(update: Any, value: float) -> None:
    logits, target = batch(12, seed=1)
    poisoned = torch.cat([logits, torch.full((1, CLASSES), value)])
    criterion, clean = DynamicLabelSmoothing(update=update), DynamicLabelSmoothing(update=update)
    criterion(poisoned, torch.cat([target, torch.tensor([0])]))
    clean(logits, target)
    if update == "epoch":
        criterion.end_epoch()
        clean.end_epoch()
    torch.testing.assert_close(criterion.distributions, clean.distributions)


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
@both_targets
def test_evaluation_gives_the_plain_cross_entropy(mode: Any, soft: bool) -> None:
    criterion = DynamicLabelSmoothing(mode)
    criterion(*batch(20, seed=1))
    logits, target = batch(6, seed=2)[0], targets(soft)
    assert torch.equal(criterion.eval()(logits, target), F.cross_entropy(logits, target))


@both_updates
def test_evaluation_updates_nothing(update: Any) -> None:
    criterion = DynamicLabelSmoothing(update=update)
    criterion(*batch(20, seed=1))
    before = criterion.state_dict()
    criterion.eval()(*batch(20, seed=2))
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def build(update: Any) -> DynamicLabelSmoothing:
    return DynamicLabelSmoothing(alpha=Ramp(0.2, 0.6, steps=8), momentum=0.2, update=update)


def train(criterion: DynamicLabelSmoothing, steps: range) -> list[Tensor]:
    """Losses of these steps; an epoch has three."""
    losses = []
    for step in steps:
        losses.append(criterion(*batch(8, seed=step)))
        if criterion.update == "epoch" and step % 3 == 2:
            criterion.end_epoch()
    return losses


def assert_equal_runs(first: DynamicLabelSmoothing, second: DynamicLabelSmoothing, steps: range) -> None:
    pairs = zip(train(first, steps), train(second, steps), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(first.distributions, second.distributions)


@both_updates
def test_restored_fresh_module_continues_bit_for_bit(update: Any) -> None:
    straight, resumed = build(update), build(update)
    train(straight, range(5))
    resumed.load_state_dict(straight.state_dict())
    assert_equal_runs(straight, resumed, range(5, 12))


@both_updates
def test_module_restored_over_another_run_continues_bit_for_bit(update: Any) -> None:
    straight, resumed = build(update), build(update)
    train(straight, range(5))
    train(resumed, range(20, 27))
    resumed.load_state_dict(straight.state_dict())
    assert_equal_runs(straight, resumed, range(5, 12))


@both_updates
def test_module_restored_from_a_file_of_weights_only_continues_bit_for_bit(update: Any) -> None:
    straight, resumed = build(update), build(update)
    train(straight, range(5))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_runs(straight, resumed, range(5, 12))


@both_updates
def test_state_of_a_module_not_used_yet_restores_the_beginning(update: Any) -> None:
    fresh, used = build(update), build(update)
    state = fresh.state_dict()
    train(used, range(5))
    used.load_state_dict(state)
    assert_equal_runs(fresh, used, range(6))


@both_updates
def test_training_on_changes_no_state_dict_taken_before(update: Any) -> None:
    criterion, resumed, straight = build(update), build(update), build(update)
    train(criterion, range(5))
    train(straight, range(5))
    state = criterion.state_dict()
    train(criterion, range(5, 12))
    resumed.load_state_dict(state)
    assert_equal_runs(straight, resumed, range(5, 12))


@both_updates
def test_restoring_the_same_state_twice_gives_two_independent_modules(update: Any) -> None:
    source, first, second = build(update), build(update), build(update)
    train(source, range(5))
    state = source.state_dict()
    first.load_state_dict(state)
    second.load_state_dict(state)
    train(first, range(5, 12))
    assert_equal_runs(source, second, range(5, 12))


@pytest.mark.parametrize(("target", "low", "high"), [([0, 3, 5], 3, 5), ([-1, 0, 2], -1, -1), ([-100, 7, 0], 7, 7)])
@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
def test_class_index_out_of_range_is_refused_with_the_range(mode: Any, target: list[int], low: int, high: int) -> None:
    with pytest.raises(ValueError, match=rf"class indices must lie in \[0, 2\].*; got values from {low} to {high}"):
        DynamicLabelSmoothing(mode)(torch.zeros(3, 3), torch.tensor(target))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (3,), (3, 5, 1)])
def test_soft_targets_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target: soft targets .* shape of the logits, \(3, 5\)") as caught:
        DynamicLabelSmoothing()(torch.zeros(3, 5), torch.zeros(shape))
    assert f"got {shape}" in str(caught.value)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 5), ()])
def test_class_indices_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"target: class indices must have shape \(3,\)") as caught:
        DynamicLabelSmoothing()(torch.zeros(3, 5), torch.zeros(shape, dtype=torch.int64))
    assert f"got {tuple(shape)}" in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_logits_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be floating, of shape \(B, K\)"):
        DynamicLabelSmoothing()(torch.zeros(shape), torch.zeros(3, dtype=torch.int64))


def test_integer_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits must be floating.*torch.int64"):
        DynamicLabelSmoothing()(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("logits", "target", "name"), [([[0.0, 1.0]], torch.tensor([1]), "logits"), (torch.zeros(1, 2), [1], "target")]
)
def test_input_that_is_no_tensor_is_refused_and_named(logits: Any, target: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor; got list"):
        DynamicLabelSmoothing()(logits, target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    logits, target = batch(6, seed=1)
    loss = DynamicLabelSmoothing()(logits, target.to(dtype))
    assert torch.equal(loss, DynamicLabelSmoothing()(logits, target))


@pytest.mark.parametrize("damage", ["nan", "negative", "no distributions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_damaged_statistics_are_refused(damage: str, dtype: torch.dtype) -> None:
    criterion = DynamicLabelSmoothing()
    criterion(*batch(60, seed=1))
    state = {name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in criterion.state_dict().items()}  # fmt: skip
    DynamicLabelSmoothing().load_state_dict(state)
    table = state["distributions"] = state["distributions"].clone()
    table[1] = {"nan": torch.nan, "negative": -0.25, "no distributions": 3.0}[damage]
    with pytest.raises(ValueError, match="the label statistics are damaged: 'distributions'"):
        DynamicLabelSmoothing().load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [{"distributions": torch.full((CLASSES, 2), 0.5)}, {"counts": torch.ones(CLASSES + 1)}],
    ids=["oblong distributions", "counts of other classes"],
)
def test_statistics_that_do_not_fit_one_another_are_refused(change: dict[str, Tensor]) -> None:
    criterion = DynamicLabelSmoothing()
    criterion(*batch(60, seed=1))
    state = criterion.state_dict() | change
    with pytest.raises(ValueError, match=r"the label statistics are damaged: of K classes they have \(K, K\)"):
        DynamicLabelSmoothing().load_state_dict(state)


@pytest.mark.parametrize("target", [[[1.5, -0.5]], [[1.1, -0.1]]])
def test_soft_targets_that_are_negative_are_refused(target: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="target: the rows of soft targets must not be negative; got -0"):
        DynamicLabelSmoothing("none")(torch.zeros(1, 2), torch.tensor(target))
    with pytest.raises(ValueError, match="soft targets must not be negative"):
        smooth_labels(torch.tensor(target), torch.full((2, 2), 0.5), 0.1)


@pytest.mark.parametrize("rows", [[[5.0, 5.0], [0.5, 0.5]], [[1.5, -0.5], [0.5, 0.5]], [[torch.nan, 1], [0.5, 0.5]]])
def test_rows_that_are_no_distributions_are_refused(rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="distributions: the rows must"):
        smooth_labels(torch.tensor([0]), torch.tensor(rows), 0.1)


def test_class_indices_as_floats_are_told_apart_from_soft_targets() -> None:
    with pytest.raises(ValueError, match=r"If these are class indices, pass target.long\(\)"):
        DynamicLabelSmoothing("none")(torch.zeros(3, 4), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
def test_refused_target_does_not_count_as_a_step(mode: Any) -> None:
    criterion = DynamicLabelSmoothing(mode)
    with pytest.raises(ValueError, match="class indices"):
        criterion(torch.zeros(3, 3), torch.tensor([0, 1, 3]))
    assert criterion.step == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("mode", "average"),
        ("mode", None),
        ("update", "step"),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("momentum", 0.0),
        ("momentum", 1.5),
    ],
)
def test_option_out_of_range_is_refused_and_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} must .*; got {value!r}"):
        DynamicLabelSmoothing(**{argument: value})


@pytest.mark.parametrize(("argument", "value"), [("alpha", "half"), ("momentum", "half")])
def test_option_of_a_wrong_type_is_refused_and_named(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be .*{value!r}"):
        DynamicLabelSmoothing(**{argument: value})


def test_other_number_of_classes_is_refused_with_both_numbers() -> None:
    criterion = DynamicLabelSmoothing()
    criterion(*batch(6, seed=1, classes=4))
    with pytest.raises(ValueError, match="statistics are of 4 classes; the logits have 7"):
        criterion(*batch(6, seed=1, classes=7))


def test_state_of_another_number_of_classes_is_refused_at_the_next_step() -> None:
    source, other = DynamicLabelSmoothing(), DynamicLabelSmoothing()
    source(*batch(6, seed=1, classes=4))
    other.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="statistics are of 4 classes; the logits have 7"):
        other(*batch(6, seed=1, classes=7))


@pytest.mark.parametrize("mode", ["class_mean", "past", "uniform", "none"])
def test_end_epoch_changes_nothing_where_nothing_is_collected_over_an_epoch(mode: Any) -> None:
    criterion, other = (of_mode(mode) for _ in range(2))
    for step in range(3):
        values = (*batch(6, seed=step), torch.arange(6))
        assert torch.equal(criterion(*values), other(*values))
        criterion.end_epoch()
        criterion.end_epoch()
    state = criterion.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_end_epoch_before_any_step_changes_nothing() -> None:
    criterion = DynamicLabelSmoothing(update="epoch", alpha=0.2)
    criterion.end_epoch()
    logits, target = batch(6, seed=1)
    torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, target, label_smoothing=0.2))


def test_module_has_no_parameters() -> None:
    criterion = DynamicLabelSmoothing()
    criterion(*batch(6, seed=1))
    assert not list(criterion.parameters())


# Many labels an image: segmentation and sequences.

IGNORED = 255


def maps(seed: int, size: tuple[int, ...] = (5, 3)) -> tuple[Tensor, Tensor]:
    """Three images' logits (3, K, *size), about two thirds of them correct, and labels (3, *size), some ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (3, *size), generator=generator)
    onehot = F.one_hot(target, CLASSES).movedim(-1, 1)
    logits = torch.randn(3, CLASSES, *size, generator=generator) + onehot
    target[torch.rand(3, *size, generator=generator) < 0.2] = IGNORED
    return logits, target


def positions(logits: Tensor, target: Tensor) -> list[tuple[int, list[float], int]]:
    """Image, logits and label of each position that is not ignored."""
    found = []
    for image in range(len(logits)):
        labels = target[image].flatten().tolist()
        rows = logits[image].flatten(1).T.tolist()
        found += [(image, row, label) for row, label in zip(rows, labels, strict=True) if label != IGNORED]
    return found


def image_means(logits: Tensor, target: Tensor) -> list[tuple[int, list[float]]]:
    """Class and mean softmax over its correct positions, for each class of each image."""
    collected: dict[tuple[int, int], list[list[float]]] = {}
    for image, row, label in positions(logits, target):
        for member, probabilities in correct_samples(torch.tensor([row]), torch.tensor([label])):
            collected.setdefault((image, member), []).append(probabilities)
    return [(label, mean_of(rows)) for (_, label), rows in collected.items()]


@pytest.mark.parametrize("size", [(5, 3), (7,), (2, 3, 2)])
def test_segmentation_loss_and_means_are_those_of_explicit_loops(size: tuple[int, ...]) -> None:
    """The loss is the mean over labelled positions; an image is one sample of each class correct somewhere in it."""
    criterion = DynamicLabelSmoothing(alpha=0.4, momentum=0.01, ignore_index=IGNORED)
    collected: list[list[list[float]]] = [[] for _ in range(CLASSES)]
    for step in range(4):
        logits, target = maps(seed=step, size=size)
        means = [mean_of(rows) if rows else [1 / CLASSES] * CLASSES for rows in collected]
        found = positions(logits, target)
        rows, labels = torch.tensor([row for _, row, _ in found]), torch.tensor([label for _, _, label in found])
        expected = reference_loss(rows, labels, means, 0.4)
        assert float(criterion(logits, target)) == pytest.approx(expected, rel=1e-5)
        for label, probabilities in image_means(logits, target):
            collected[label].append(probabilities)
    torch.testing.assert_close(criterion.distributions, torch.tensor([mean_of(rows) for rows in collected]))
    assert criterion.counts.tolist() == [len(rows) for rows in collected]


def test_segmentation_means_by_epoch_are_those_of_explicit_loops() -> None:
    criterion = DynamicLabelSmoothing(update="epoch", ignore_index=IGNORED)
    collected: list[list[list[float]]] = [[] for _ in range(CLASSES)]
    for step in range(3):
        logits, target = maps(seed=step)
        criterion(logits, target)
        for label, probabilities in image_means(logits, target):
            collected[label].append(probabilities)
    criterion.end_epoch()
    torch.testing.assert_close(criterion.distributions, torch.tensor([mean_of(rows) for rows in collected]))


def test_running_segmentation_mean_moves_by_each_image_as_documented() -> None:
    criterion = DynamicLabelSmoothing(momentum=0.25, ignore_index=IGNORED)
    means, seen = uniform_rows(), [0] * CLASSES
    for step in range(12):
        logits, target = maps(seed=step)
        logits, target = logits[:1], target[:1]
        criterion(logits, target)
        move_means(means, seen, image_means(logits, target), momentum=0.25)
        torch.testing.assert_close(criterion.distributions, torch.tensor(means))
    assert max(seen) > 4  # the exponential part was reached


def test_images_of_one_position_are_classification() -> None:
    logits, target = batch(20, seed=1)
    plain, dense = DynamicLabelSmoothing(), DynamicLabelSmoothing()
    for _ in range(2):
        torch.testing.assert_close(dense(logits[:, :, None, None], target[:, None, None]), plain(logits, target))
    torch.testing.assert_close(dense.distributions, plain.distributions)


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_ignored_labels_count_as_in_cross_entropy(mode: Any, training: bool) -> None:
    logits, target = maps(seed=1)
    criterion = of_mode(mode, alpha=0.2, ignore_index=IGNORED).train(training)
    smoothing = 0.2 if training and mode != "none" else 0.0
    expected = F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing)
    torch.testing.assert_close(criterion(logits, target), expected)


def test_ignored_labels_pass_no_gradient() -> None:
    logits, target = maps(seed=1)
    criterion = DynamicLabelSmoothing(ignore_index=IGNORED)
    criterion(logits.requires_grad_(), target).backward()
    ignored = (target == IGNORED)[:, None].expand_as(logits)
    assert torch.equal(logits.grad[ignored], torch.zeros(ignored.sum()))
    assert (logits.grad[~ignored] != 0).all()


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
def test_minus_hundred_is_ignored_without_being_asked_to(mode: Any) -> None:
    logits, target = batch(6, seed=1)
    target[:2] = -100
    criterion = of_mode(mode, alpha=0.2)
    expected = F.cross_entropy(logits, target, label_smoothing=0.0 if mode == "none" else 0.2)
    torch.testing.assert_close(criterion(logits, target), expected)


def test_class_that_is_ignored_has_no_statistics() -> None:
    logits, target = torch.eye(CLASSES) * 5, torch.arange(CLASSES)
    criterion = DynamicLabelSmoothing(ignore_index=0)
    criterion(logits, target)
    assert criterion.counts.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("mode", ["class_mean", "none"])
def test_batch_all_ignored_is_nan_as_in_cross_entropy_and_moves_no_class_mean(mode: Any) -> None:
    logits, target = batch(6, seed=1)
    criterion = DynamicLabelSmoothing(mode)
    criterion(logits, target)
    before = criterion.distributions.clone()
    assert criterion(logits, torch.full_like(target, -100)).isnan()
    assert torch.equal(criterion.distributions, before)


def test_soft_targets_of_segmentation_are_taken() -> None:
    logits = maps(seed=1)[0]
    soft = maps(seed=2)[0].softmax(dim=1)
    loss = DynamicLabelSmoothing(alpha=0.2)(logits, soft)
    torch.testing.assert_close(loss, F.cross_entropy(logits, soft, label_smoothing=0.2))


def test_labels_of_another_image_size_are_refused_with_the_size_wanted() -> None:
    with pytest.raises(ValueError, match=r"target: class indices must have shape \(2, 8, 8\).*; got \(2, 16, 16\)"):
        DynamicLabelSmoothing()(torch.zeros(2, 5, 8, 8), torch.zeros(2, 16, 16, dtype=torch.int64))


def test_logits_with_the_classes_last_are_refused_with_the_way_out() -> None:
    logits, target = torch.randn(2, 7, 5), torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target: .*pass logits\.movedim\(-1, 1\)"):
        DynamicLabelSmoothing()(logits, target)
    assert DynamicLabelSmoothing()(logits.movedim(-1, 1), target).isfinite()


@pytest.mark.parametrize(
    ("shape", "advice"), [((4, 1), r"Pass target\.squeeze\(1\)"), ((3,), "Give one label for each prediction")]
)
def test_labels_of_another_shape_are_refused_with_what_fits_it(shape: tuple[int, ...], advice: str) -> None:
    with pytest.raises(ValueError, match=f"target: class indices must have shape .*{advice}"):
        DynamicLabelSmoothing()(torch.randn(4, 5), torch.zeros(shape, dtype=torch.int64))


def test_distributions_that_do_not_sum_to_one_are_refused_without_talk_of_targets() -> None:
    with pytest.raises(ValueError, match=r"distributions: the rows must sum to 1.*got a sum of 2$"):
        smooth_labels(torch.tensor([0]), torch.ones(2, 2), 0.5)


# Many classes: only the rows seen are exchanged and moved.


@both_updates
@pytest.mark.parametrize("kind", ["hard", "soft", "segmentation"])
def test_rows_seen_give_the_statistics_of_all_rows(monkeypatch: Any, update: Any, kind: str) -> None:
    runs = {}
    for limit in (0, 128):
        monkeypatch.setattr("sfr.labels.class_means.ALL_ROWS_ON_CPU_UP_TO", limit)
        criterion = DynamicLabelSmoothing(update=update, momentum=0.3, ignore_index=IGNORED)
        for step in range(6):
            logits, target = maps(step) if kind == "segmentation" else batch(3, step)
            criterion(logits, distributions(3, CLASSES, seed=step) if kind == "soft" else target)
        if update == "epoch":
            criterion.end_epoch()
        runs[limit] = criterion
    torch.testing.assert_close(runs[0].distributions, runs[128].distributions)
    torch.testing.assert_close(runs[0].counts, runs[128].counts)
    assert not torch.equal(runs[0].distributions, torch.full((CLASSES, CLASSES), 1 / CLASSES))


def of_one_rank(rank: int) -> list[tuple[Tensor, list[int]]]:
    """Train on an uneven share of the batches, with the rows seen and then with all rows; note what is exchanged."""
    import sfr.labels.class_means

    all_reduce, sizes, found = dist.all_reduce, [], []

    def noted(values: Tensor) -> None:
        sizes.append(values.numel())
        all_reduce(values)

    dist.all_reduce = noted
    for limit in (0, 128):
        sfr.labels.class_means.ALL_ROWS_ON_CPU_UP_TO = limit
        criterion = DynamicLabelSmoothing(momentum=0.3)
        for step in range(4):
            logits, target = batch(8, step)
            share = slice(5) if rank == 0 else slice(5, 8)
            criterion(logits[share], target[share])
        found.append((criterion.distributions, sizes.copy()))
        sizes.clear()
    dist.all_reduce = all_reduce
    return found


def test_two_ranks_with_uneven_shares_get_the_statistics_of_one_by_few_numbers() -> None:
    criterion = DynamicLabelSmoothing(momentum=0.3)
    of_rows_seen, of_all_rows = [], []
    for step in range(4):
        logits, target = batch(8, step)
        criterion(logits, target)
        seen = {label for label, _ in correct_samples(logits, target)}
        of_rows_seen += [CLASSES, len(seen) * (CLASSES + 1)]
        of_all_rows += [CLASSES * (CLASSES + 1)]
    for found in run_ranks(of_one_rank):
        for (distributions, sizes), expected in zip(found, (of_rows_seen, of_all_rows), strict=True):
            torch.testing.assert_close(distributions, criterion.distributions)
            assert sizes == expected


def test_running_means_hold_no_sums_of_an_epoch() -> None:
    criterion = DynamicLabelSmoothing()
    criterion(*batch(6, seed=1))
    assert criterion.sums.numel() == 0


# What cannot be right is an error.


@pytest.mark.parametrize(
    ("target", "distributions", "alpha", "error", "message"),
    [
        ([0], None, 2, ValueError, r"alpha must lie in \[0, 1\]; got 2"),
        ([0], None, -0.1, ValueError, "alpha must lie in"),
        ([0], None, "half", TypeError, "alpha must be a number"),
        ([0, -1], None, 0.1, ValueError, r"target: class indices must lie in \[0, 3\]; got values from -1 to -1"),
        ([4], None, 0.1, ValueError, r"target: class indices must lie in \[0, 3\]; got values from 4 to 4"),
        ([-100], None, 0.1, ValueError, "target: class indices must lie in"),
        ([[0, 1]], None, 0.1, ValueError, r"target: class indices must have shape \(N,\); got torch.int64 \(1, 2\)"),
        ([True], None, 0.1, ValueError, "target: class indices must have shape"),
        ([[0.5, 0.5]], None, 0.1, ValueError, r"target: soft targets must have shape \(N, 4\); got \(1, 2\)"),
        ([0.5] * 4, None, 0.1, ValueError, r"target: soft targets must have shape \(N, 4\); got \(4,\)"),
        ([[1.0, 1.0, 0.0, 0.0]], None, 0.1, ValueError, "target: the rows of soft targets must sum to 1"),
        ([0], torch.ones(4, 3), 0.1, ValueError, r"distributions must have shape \(K, K\).*; got \(4, 3\)"),
        ([0], torch.ones(4), 0.1, ValueError, r"distributions must have shape \(K, K\)"),
        (
            [0],
            torch.ones(4, 4, dtype=torch.int64),
            0.1,
            TypeError,
            "distributions must be a floating-point tensor; got",
        ),
        ([0], [[1.0]], 0.1, TypeError, "distributions must be a floating-point tensor; got list"),
    ],
)
def test_smoothing_labels_names_the_argument_that_does_not_fit(
    target: Any, distributions: Any, alpha: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        smooth_labels(torch.tensor(target), torch.eye(4) if distributions is None else distributions, alpha)


def test_smoothing_labels_that_are_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="target must be a tensor; got list"):
        smooth_labels([0], torch.eye(4), 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_smoothing_takes_class_indices_of_any_integer_type(dtype: torch.dtype) -> None:
    target, means = torch.tensor([1, 0, 1]), distributions(CLASSES, CLASSES)
    assert torch.equal(smooth_labels(target.to(dtype), means, 0.3), smooth_labels(target, means, 0.3))


every_mode = pytest.mark.parametrize("mode", ["class_mean", "uniform", "none", "past"])
either_way = pytest.mark.parametrize("training", [True, False])


def of_mode(mode: Any, training: bool = True, **options: Any) -> DynamicLabelSmoothing:
    num_samples = 100 if mode == "past" else None
    if mode == "none":
        options.pop("alpha", None)  # it would be an error
    return DynamicLabelSmoothing(mode, num_samples=num_samples, **options).train(training)


@every_mode
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_labels_an_image_are_no_distribution(mode: Any, training: bool, dtype: torch.dtype) -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=dtype)
    with pytest.raises(ValueError, match=r"rows of soft targets must sum to 1.*; got a sum of 2.*BCEWithLogitsLoss"):
        of_mode(mode, training)(logits, target, torch.arange(2))


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [float("nan"), 0.5, 0.5], [3.0, -1.0, 2.0]])
def test_rows_that_sum_to_something_else_are_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match="rows of soft targets must sum to 1"):
        DynamicLabelSmoothing()(torch.zeros(1, 3), torch.tensor([row]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_targets_rounded_to_half_precision_are_taken(dtype: torch.dtype) -> None:
    target = (0.9 * F.one_hot(torch.arange(64), 1000) + 0.1 / 1000).to(dtype)
    assert DynamicLabelSmoothing()(torch.zeros(64, 1000), target).isfinite()


@every_mode
@either_way
@pytest.mark.parametrize("target", [torch.rand(4, 1), torch.rand(4), torch.zeros(4, dtype=torch.long)])
def test_a_regression_is_asked_for_a_loss_of_its_own(mode: Any, training: bool, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(4, 1\) have one class.*label_loss=nn.MSELoss\(\)"):
        of_mode(mode, training)(torch.randn(4, 1), target)


def test_a_regression_without_an_axis_of_classes_is_asked_for_a_loss_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"logits must be floating, .*label_loss=nn.MSELoss\(\)"):
        DynamicLabelSmoothing()(torch.randn(4), torch.rand(4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_one_hot_target_of_integers_is_told_what_to_pass(dtype: torch.dtype) -> None:
    onehot = torch.eye(3, dtype=dtype)
    with pytest.raises(ValueError, match=r"one-hot, pass target.argmax\(dim=1\), or target.float\(\)"):
        DynamicLabelSmoothing()(torch.zeros(3, 3), onehot)
    assert DynamicLabelSmoothing()(torch.zeros(3, 3), onehot.float()).isfinite()


def test_another_number_of_classes_is_told_to_make_a_new_criterion() -> None:
    for mode in ("class_mean", "past"):
        criterion = of_mode(mode)
        criterion(torch.zeros(2, 3), torch.tensor([0, 1]), torch.arange(2))
        with pytest.raises(ValueError, match="model with another head make a new criterion"):
            criterion(torch.zeros(2, 4), torch.tensor([0, 1]), torch.arange(2))


# Masked classes, whose logits are -inf or so low that it makes no difference, and batches without a sample.

MASKS = [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4]
every_mask = pytest.mark.parametrize("low", MASKS)


def masked(seed: int, size: int = 6, low: float = -math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of which one or two classes of each sample are impossible, its label never."""
    logits, target = batch(size, seed)
    hidden = torch.rand(size, CLASSES, generator=torch.Generator().manual_seed(seed)).topk(2, dim=1).indices
    mask = torch.zeros(size, CLASSES, dtype=torch.bool).scatter(1, hidden, True)
    mask[torch.arange(size), target] = False
    return logits.masked_fill(mask, low), target, torch.arange(size)


@every_mask
@pytest.mark.parametrize(
    ("mode", "soft"),
    [
        ("class_mean", False),
        ("class_mean", True),
        ("uniform", False),
        ("uniform", True),
        ("past", False),
        ("none", False),
        ("none", True),
    ],
)
def test_the_loss_and_its_gradient_are_moderate_with_masked_classes(mode: Any, soft: bool, low: float) -> None:
    criterion = of_mode(mode, alpha=0.5)
    for step in range(8):
        logits, target, index = masked(step, low=low)
        hidden = logits == low
        if soft:
            target = torch.randn(6, CLASSES).masked_fill(hidden, -math.inf).softmax(dim=1)
        logits.requires_grad_()
        loss = criterion(logits, target, index)
        loss.backward()
        assert 0 < loss < 10
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[hidden] == 0).all()
    assert criterion.distributions.isfinite().all()


@every_mask
@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
def test_a_class_that_is_always_masked_is_as_if_it_were_not_there(mode: Any, low: float) -> None:
    criterion, without = of_mode(mode, alpha=0.3), of_mode(mode, alpha=0.3)
    for step in range(6):
        logits, target = batch(8, step)
        longer = torch.cat([logits, torch.full((8, 2), low)], dim=1)
        torch.testing.assert_close(criterion(longer, target), without(logits, target))
    size = len(without.distributions)
    torch.testing.assert_close(criterion.counts[:size], without.counts)


def test_past_predictions_count_among_the_possible_classes_alone() -> None:
    criterion = of_mode("past", alpha=0.5)
    logits, target, index = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]), torch.tensor([0])
    criterion(logits, target, index)
    loss = criterion(torch.tensor([[-math.inf, 1.0, 1.0]]), target, index)
    said = torch.tensor([0.0, 2.0, 3.0]).exp() * torch.tensor([0.0, 1.0, 1.0])
    expected = 0.5 * torch.tensor([0.0, 0.0, 1.0]) + 0.5 * said / said.sum()
    torch.testing.assert_close(loss, -(expected[1:] * math.log(0.5)).sum(), rtol=1e-3, atol=0)


@every_mode
def test_a_label_that_is_masked_costs_infinity_as_in_cross_entropy(mode: Any) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 1.0]])
    assert of_mode(mode, alpha=0.5)(logits, torch.tensor([0]), torch.tensor([0])) == math.inf


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "past"])
def test_where_nothing_is_masked_looking_or_not_gives_the_same_loss(monkeypatch: Any, mode: Any) -> None:
    """On a GPU, where looking would cost a sync, masks are allowed for in every step."""
    looking, allowing = of_mode(mode), of_mode(mode)
    for step in range(4):
        logits, target = batch(6, step)
        losses = [looking(logits, target, torch.arange(6))]
        with monkeypatch.context() as patch:
            for module in ("smoothing", "cross_entropy"):
                patch.setattr(f"sfr.labels.{module}.may_hold_impossible", lambda _: True)
            losses.append(allowing(logits, target, torch.arange(6)))
        if mode == "uniform":
            torch.testing.assert_close(*losses)
        else:
            assert torch.equal(*losses)
    assert torch.equal(looking.distributions, allowing.distributions)


def test_masked_classes_of_an_image_s_positions_are_left_out() -> None:
    logits, target = maps(seed=1)
    target = target.where(target != IGNORED, -100)
    longer = torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], dim=1)
    for mode in ("class_mean", "uniform"):
        torch.testing.assert_close(of_mode(mode)(longer, target), of_mode(mode)(logits, target))


@every_mode
@either_way
@pytest.mark.parametrize("rest", [(), (4, 4)], ids=["classification", "segmentation"])
def test_an_empty_batch_is_nan_as_in_cross_entropy_and_moves_nothing(mode: Any, training: bool, rest: Any) -> None:
    if rest and mode == "past":
        pytest.skip("past predictions are for classification")
    criterion = of_mode(mode)
    criterion(*masked(1))
    criterion.train(training)
    before = criterion.state_dict()
    logits = torch.zeros(0, CLASSES, *rest, requires_grad=True)
    loss = criterion(logits, torch.zeros(0, *rest, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert loss.isnan()
    loss.backward()
    after = criterion.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "step")


@pytest.mark.parametrize("mode", ["class_mean", "uniform", "none"])
def test_an_empty_batch_of_soft_targets_is_nan_as_in_cross_entropy(mode: Any) -> None:
    assert of_mode(mode, alpha=0.3)(torch.zeros(0, CLASSES), torch.zeros(0, CLASSES)).isnan()


def test_numbers_of_numpy_are_taken() -> None:
    moving = Ramp(np.float32(0.25), np.float64(0.5), steps=np.int64(4))  # type: ignore[arg-type]
    ours = DynamicLabelSmoothing(alpha=moving, momentum=np.float16(0.5), ignore_index=np.int32(255))  # type: ignore[arg-type]
    expected = DynamicLabelSmoothing(alpha=Ramp(0.25, 0.5, steps=4), momentum=0.5, ignore_index=255)
    for step in range(3):
        assert torch.equal(ours(*batch(6, step)), expected(*batch(6, step)))
    assert type(ours.current_alpha()) is float
    torch.testing.assert_close(
        smooth_labels(torch.tensor([0]), torch.eye(2), np.float32(0.5)),  # type: ignore[arg-type]
        torch.tensor([[1.0, 0.0]]),
    )
