"""smoothing="past": targets that move towards what the network said of the same sample when it last saw it."""

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import sfr
from sfr.labels import DynamicLabelSmoothing
from sfr.labels.past_predictions import PastPredictions

CLASSES, SAMPLES = 4, 12


def build(**options: Any) -> DynamicLabelSmoothing:
    return DynamicLabelSmoothing("past", num_samples=SAMPLES, **options)


def step(number: int, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and numbers of some samples, of which some steps have some in common."""
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(SAMPLES, generator=generator)[:size]
    return torch.randn(size, CLASSES, generator=generator), index % CLASSES, index


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


class ByHand:
    """The same with a dictionary and loops."""

    def __init__(self) -> None:
        self.said: dict[int, list[float]] = {}

    def loss(self, logits: Tensor, target: Tensor, index: Tensor, alpha: float) -> float:
        total = 0.0
        for row, label, number in zip(logits.tolist(), target.tolist(), index.tolist(), strict=True):
            onehot = [float(k == label) for k in range(CLASSES)]
            past, now = self.said.get(number, onehot), softmax(row)
            for k in range(CLASSES):
                total -= ((1 - alpha) * onehot[k] + alpha * past[k]) * math.log(now[k])
            self.said[number] = now
        return total / len(logits)


def test_loss_is_that_of_explicit_loops_over_many_steps() -> None:
    criterion, by_hand = build(alpha=sfr.Ramp(0.2, 0.8, steps=10)), ByHand()
    for number in range(15):
        alpha = 0.2 + 0.6 * min(1.0, number / 10)
        expected = by_hand.loss(*step(number), alpha)
        assert criterion(*step(number)).item() == pytest.approx(expected, rel=1e-3)
    assert len(by_hand.said) == SAMPLES


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_the_table_is_the_mean_of_all_predictions_the_older_the_less(momentum: float) -> None:
    """Temporal ensembling (Laine & Aila, arXiv 1610.02242), whose weights sum to 1 from the first prediction on."""
    past, said = PastPredictions(SAMPLES, momentum=momentum), []
    for number in range(6):
        said.append(step(number, SAMPLES)[0].softmax(dim=1))
        past.remember(torch.arange(SAMPLES), said[-1])
        weights = torch.tensor([momentum * (1 - momentum) ** (number - k) for k in range(number + 1)])
        expected = (weights[:, None, None] * torch.stack(said)).sum(dim=0) / weights.sum()
        found = past.said(torch.arange(SAMPLES), otherwise=torch.zeros(SAMPLES, CLASSES))
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)


def test_a_momentum_of_one_keeps_the_last_prediction_to_the_last_bit() -> None:
    past = PastPredictions(SAMPLES)
    for number in range(4):
        logits, _, index = step(number)
        past.remember(index, logits.softmax(dim=1))
        assert torch.equal(past.table[index], logits.softmax(dim=1).half())


def test_a_prediction_that_is_not_finite_leaves_those_before() -> None:
    past, index, said = PastPredictions(SAMPLES, momentum=0.5), torch.tensor([3]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    past.remember(index, said)
    weights = past.table.sum()
    past.remember(index, torch.full((1, CLASSES), torch.nan))
    assert past.table.sum() == weights
    torch.testing.assert_close(past.said(index, otherwise=torch.zeros(1, CLASSES)), said, rtol=0, atol=1e-3)


def test_the_switch_of_the_criterion_is_the_momentum_of_the_table() -> None:
    assert [build().past.momentum, build(momentum=0.2).past.momentum] == [1.0, 0.2]
    config = sfr.SFRConfig(smoothing="past", num_samples=SAMPLES, momentum=0.2)
    assert DynamicLabelSmoothing(**config.of_labels()).past.momentum == 0.2
    with pytest.raises(ValueError, match="momentum must lie in"):
        PastPredictions(SAMPLES, momentum=1.5)


def test_a_sample_not_seen_yet_has_its_label_for_a_target() -> None:
    logits, target, index = step(0)
    torch.testing.assert_close(build(alpha=0.7)(logits, target, index), F.cross_entropy(logits, target))


def test_gradient_is_prediction_minus_target_and_passes_no_past() -> None:
    criterion = build(alpha=0.5)
    logits, target, index = step(0)
    criterion(logits.requires_grad_(), target, index)
    again = logits.detach().roll(1, dims=1).requires_grad_()
    criterion(again, target, index).backward()
    expected = again.softmax(dim=1) - 0.5 * F.one_hot(target, CLASSES) - 0.5 * logits.softmax(dim=1)
    torch.testing.assert_close(again.grad, expected.detach() / len(logits), rtol=0, atol=1e-4)
    assert logits.grad is None


def test_evaluation_is_cross_entropy_without_an_index_and_remembers_nothing() -> None:
    criterion = build()
    criterion(*step(0))
    before = criterion.past.table.clone()
    logits, target, _ = step(1)
    assert torch.equal(criterion.eval()(logits, target), F.cross_entropy(logits, target))
    assert torch.equal(criterion.past.table, before)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0, "early_learning": 3.0}], ids=["smoothed", "early learning"])
def test_ignored_samples_count_neither_in_the_loss_nor_in_its_mean(options: dict[str, Any]) -> None:
    criterion, of_the_others = build(ignore_index=255, **options), build(**options)
    for number in range(4):
        logits, target, _ = step(number)
        index = torch.arange(5)
        expected = of_the_others(logits[2:], target[2:], index[2:])
        target[:2] = 255
        torch.testing.assert_close(criterion(logits, target, index), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_not_finite_are_not_remembered(value: float) -> None:
    criterion = build(alpha=0.5)
    logits, target, index = step(0)
    broken = logits.clone()
    broken[1, 2] = value
    criterion(broken, target, index)
    said = torch.where(torch.arange(5)[:, None] == 1, F.one_hot(target, CLASSES), logits.softmax(dim=1))
    expected = F.cross_entropy(logits, 0.5 * F.one_hot(target, CLASSES) + 0.5 * said)
    torch.testing.assert_close(criterion(logits, target, index), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    criterion = build()
    logits, target, index = step(0)
    losses = [criterion(logits.to(dtype), target, index) for _ in range(2)]
    assert {loss.dtype for loss in losses} == {torch.promote_types(dtype, torch.float32)}
    # Its own prediction is a target that costs less than the label: its entropy is less than its cross-entropy.
    assert losses[0] != losses[1]


def test_resumed_run_continues_bit_for_bit() -> None:
    straight, resumed = (build(alpha=sfr.Ramp(0.5, 0.9, steps=20)) for _ in range(2))
    for number in range(6):
        straight(*step(number))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for number in range(6, 12):
        assert torch.equal(straight(*step(number)), resumed(*step(number)))
    assert torch.equal(straight.past.table, resumed.past.table)


def test_training_on_changes_no_state_dict_taken_before() -> None:
    criterion = build()
    criterion(*step(0))
    state = criterion.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    criterion(*step(1))
    assert before
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_an_index_has_no_effect_on_the_other_modes() -> None:
    logits, target, index = step(0)
    for mode in ("class_mean", "uniform", "none"):
        assert torch.equal(
            DynamicLabelSmoothing(mode)(logits, target, index), DynamicLabelSmoothing(mode)(logits, target)
        )


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, r"criterion\(logits, target, index=index\)"),
        (torch.arange(4), ValueError, r"index must have shape \(5,\), .*; got \(4,\)"),
        (torch.arange(5)[:, None], ValueError, r"index must have shape \(5,\)"),
        (torch.arange(5.0), TypeError, r"index must be a tensor of integers; got torch.float32"),
        ([0, 1, 2, 3, 4], TypeError, r"index must be a tensor of integers; got list"),
        (torch.arange(5).to(torch.complex64), TypeError, r"index must be a tensor of integers; got torch.complex64"),
        (torch.arange(5).to(torch.uint16), TypeError, r"index must be a tensor of integers; got torch.uint16"),
        (torch.arange(8, 13), ValueError, r"index must lie in \[0, 11\].*; got values from 8 to 12"),
        (torch.arange(-1, 4), ValueError, r"index must lie in \[0, 11\].*; got values from -1 to 3"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_and_no_step_counts(index: Any, error: Any, message: str) -> None:
    criterion = build()
    with pytest.raises(error, match=message):
        criterion(*step(0)[:2], index)
    assert criterion.step == 0


def test_soft_targets_and_segmentation_have_no_past() -> None:
    logits, target, index = step(0)
    with pytest.raises(ValueError, match="a mixed image has no past"):
        build()(logits, F.one_hot(target, CLASSES).float(), index)
    with pytest.raises(ValueError, match="needs logits of shape"):
        build()(torch.zeros(5, CLASSES, 2, 2), torch.zeros(5, 2, 2, dtype=torch.long), index)


@pytest.mark.parametrize(("mode", "num_samples"), [("past", None), ("class_mean", 10), ("none", 10)])
def test_the_number_of_samples_belongs_to_this_mode_alone(mode: Any, num_samples: int | None) -> None:
    with pytest.raises(ValueError, match="num_samples must be given for mode='past' and only then"):
        DynamicLabelSmoothing(mode, num_samples=num_samples)
    with pytest.raises(ValueError, match="num_samples must be given for smoothing='past' and only then"):
        sfr.SFRConfig(smoothing=mode, num_samples=num_samples)


def test_past_of_another_shape_is_refused() -> None:
    criterion = build()
    criterion(*step(0))
    other = DynamicLabelSmoothing("past", num_samples=SAMPLES + 1)
    other.load_state_dict(criterion.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(12, 4\), not \(13, 4\)"):
        other(*step(0))


def test_the_wrapper_s_criterion_takes_numbers_from_a_data_loader() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, 3, 16, 16), torch.arange(SAMPLES) % CLASSES)
    features = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*features, nn.Flatten(), nn.Linear(16, CLASSES))
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model, smoothing="past", num_samples=len(data), feature_weight=0)
    by_hand = ByHand()
    for _ in range(2):
        for (images, labels), index in DataLoader(StackDataset(data, range(len(data))), batch_size=5, shuffle=True):
            logits = model(images)
            expected = by_hand.loss(logits.detach(), labels, index, alpha=criterion.labels.current_alpha())
            assert criterion(logits, labels, index=index).item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="StackDataset"):
        criterion(model(images), labels)


def of_one_rank(rank: int) -> Tensor:
    criterion = build()
    for number in range(4):
        share = slice(3) if rank == 0 else slice(3, 5)
        criterion(*(values[share] for values in step(number)))
    return criterion.past.table


def test_two_ranks_with_uneven_shares_remember_what_one_does() -> None:
    criterion = build()
    for number in range(4):
        criterion(*step(number))
    for table in run_ranks(of_one_rank):
        assert torch.equal(table, criterion.past.table)


def test_table_takes_two_bytes_for_a_class_of_a_sample() -> None:
    past = PastPredictions(num_samples=1000)
    past.remember(torch.tensor([3]), torch.full((1, 10), 0.1))
    assert past.table.nbytes == 2 * 1000 * 10


def test_of_a_sample_that_is_twice_in_a_batch_the_last_prediction_is_remembered() -> None:
    torch.manual_seed(0)
    numbers = [3, 1, 3, 3, 0, 1, 2, 3] * 200
    logits = torch.randn(len(numbers), CLASSES)
    criterion = build(alpha=0.5)
    criterion(logits, torch.zeros(len(numbers), dtype=torch.long), torch.tensor(numbers))
    for number in set(numbers):
        last = max(row for row, other in enumerate(numbers) if other == number)
        assert torch.equal(criterion.past.table[number], logits[last].softmax(dim=0).half())


def of_one_rank_with_the_same_samples(rank: int) -> Tensor:
    past = PastPredictions(SAMPLES)
    said = torch.eye(CLASSES)[[rank, 2 + rank]]
    past.remember(torch.tensor([7, 7 + rank]), said)
    return past.table


def test_of_a_sample_that_two_ranks_have_the_prediction_of_the_last_rank_is_remembered() -> None:
    tables = run_ranks(of_one_rank_with_the_same_samples)
    assert torch.equal(tables[0], tables[1])
    assert tables[0][[7, 8]].argmax(dim=1).tolist() == [1, 3]


def test_two_labels_of_one_forward_are_refused(make_net: Any, batch: tuple[Tensor, Tensor]) -> None:
    """A sample's past would move twice in a step, and the images of MixUp have none."""
    images, target = batch
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, smoothing="past", num_samples=len(images))
    logits, index = model(images), torch.arange(len(images))
    criterion(logits, target, index=index)
    with pytest.raises(ValueError, match="past predictions take one call a step"):
        criterion(logits, target.flip(0), index=index)
