"""early_learning: the network keeps to what it said of a sample before it learned a wrong label by heart."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from sfr.labels import DynamicLabelSmoothing
from sfr.labels.early_learning import LEAST, slope_of_agreed

CLASSES, SAMPLES = 11, 14


def build(**options: Any) -> DynamicLabelSmoothing:
    return DynamicLabelSmoothing("past", num_samples=SAMPLES, **{"alpha": 0.0, "early_learning": 3.0} | options)


def step(number: int, size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and numbers of some samples, of which some steps have some in common."""
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(SAMPLES, generator=generator)[:size]
    return 2 * torch.randn(size, CLASSES, generator=generator), index % CLASSES, index


class ByHand:
    """The formula of Liu et al. with a dictionary and loops."""

    def __init__(self, weight: float, beta: float) -> None:
        self.weight, self.beta = weight, beta
        self.targets: dict[int, list[float]] = {}

    def loss(self, logits: Tensor, target: Tensor, index: Tensor) -> float:
        total = 0.0
        for row, label, number in zip(logits.tolist(), target.tolist(), index.tolist(), strict=True):
            exponentials = [math.exp(value) for value in row]
            now = [value / sum(exponentials) for value in exponentials]
            before = self.targets.get(number, [0.0] * CLASSES)
            towards = [self.beta * t + (1 - self.beta) * p for t, p in zip(before, now, strict=True)]
            self.targets[number] = towards
            agreement = sum(t * p for t, p in zip(towards, now, strict=True))
            total += -math.log(now[label]) + self.weight * math.log(1 - agreement)
        return total / len(logits)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("weight", [3, 0.5])
def test_loss_is_that_of_elr_by_explicit_loops_over_many_steps(weight: float, momentum: float | None) -> None:
    criterion = build(early_learning=weight, momentum=momentum)
    by_hand = ByHand(weight, 1 - (momentum or 0.3))
    for number in range(20):
        expected = by_hand.loss(*step(number))
        assert criterion(*step(number)).item() == pytest.approx(expected, rel=5e-3, abs=2e-3)
    assert len(by_hand.targets) == SAMPLES


def test_it_adds_to_the_targets_that_are_smoothed() -> None:
    both, smoothed, alone = build(alpha=0.6), build(alpha=0.6, early_learning=0.0, momentum=0.3), build()
    for number in range(6):
        logits, target, index = step(number)
        expected = smoothed(logits, target, index) + alone(logits, target, index) - F.cross_entropy(logits, target)
        torch.testing.assert_close(both(logits, target, index), expected)


def test_its_gradient_draws_the_network_towards_what_it_said() -> None:
    """A sample whose label is new to the network: less of the gradient goes to the label than without."""
    criterion, index, said = build(), torch.tensor([5]), F.one_hot(torch.tensor([0]), CLASSES) * 3.0
    for _ in range(5):
        criterion(said, torch.tensor([0]), index)
    gradients = {}
    for name, term in (("with", criterion), ("without", nn.CrossEntropyLoss())):
        leaf = said.clone().requires_grad_()
        (term(leaf, torch.tensor([2]), index) if name == "with" else term(leaf, torch.tensor([2]))).backward()
        gradients[name] = leaf.grad
    assert gradients["without"][0, 0] > 0.6
    assert gradients["with"][0, 0] < gradients["without"][0, 0] / 2


def test_the_slope_that_is_written_out_is_that_of_autograd() -> None:
    softmax, means = (torch.randn(6, CLASSES).softmax(dim=1) for _ in range(2))
    logits = softmax.log().requires_grad_()
    means = torch.cat([means[:5], F.one_hot(torch.tensor([0]), CLASSES).float()])
    with torch.no_grad():
        logits[5] = F.one_hot(torch.tensor(0), CLASSES) * 40.0
    (1 - (means * logits.softmax(dim=1)).sum(dim=1)).clamp_min(LEAST).log().sum().backward()
    torch.testing.assert_close(slope_of_agreed(means, logits.detach().softmax(dim=1)), logits.grad)
    assert not logits.grad[5].any()


def test_a_network_that_is_certain_has_a_finite_loss_and_nothing_to_gain() -> None:
    criterion, index, label = build(), torch.tensor([3]), torch.tensor([1])
    for _ in range(60):
        logits = (F.one_hot(label, CLASSES) * 90.0).requires_grad_()
        loss = criterion(logits, label, index)
        loss.backward()
    assert 3 * math.log(LEAST) <= loss.item() < 3 * math.log(1e-2)
    assert logits.grad.abs().amax() < 1e-6


@pytest.mark.parametrize("hidden", [-torch.inf, -1e4])
def test_an_impossible_class_changes_nothing_for_the_others(hidden: float) -> None:
    criterion, of_the_others = build(alpha=0.5), build(alpha=0.5)
    for number in range(4):
        logits, target, index = step(number)
        wider = F.pad(logits, (0, 1), value=hidden).requires_grad_()
        loss = criterion(wider, target, index)
        torch.testing.assert_close(loss, of_the_others(logits, target, index))
        loss.backward()
        assert wider.grad.isfinite().all()


def test_a_weight_that_stays_at_zero_may_have_any_momentum() -> None:
    assert sfr.SFRConfig(smoothing="past", num_samples=5, early_learning=sfr.Ramp(0, 0, 9), momentum=1).momentum == 1


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    run, resumed = build(), build()
    for number in range(5):
        run(*step(number))
    resumed.load_state_dict(run.state_dict())
    for number in range(5, 9):
        assert torch.equal(run(*step(number)), resumed(*step(number)))


def test_the_switch_reaches_the_label_term_and_through_json() -> None:
    config = sfr.SFRConfig(smoothing="past", num_samples=SAMPLES, early_learning=3)
    assert sfr.SFRConfig.from_dict(config.to_dict()) == config
    for term in (DynamicLabelSmoothing(**config.of_labels()), build()):
        assert (term.early_learning, term.momentum, term.past.momentum) == (sfr.Ramp.of(3), 0.3, 0.3)
    assert config.without_label_term().early_learning == 0


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"early_learning": 3.0}, r"without effect with smoothing='none', leave out: early_learning \(of smoothing="),
        ({"early_learning": 3.0, "smoothing": "class_mean"}, "without effect with smoothing='class_mean'"),
        ({"early_learning": -1, "smoothing": "past", "num_samples": 5}, "early_learning must be finite and at least 0"),
        ({"early_learning": 3, "smoothing": "past", "num_samples": 5, "momentum": 1}, "momentum below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sfr.SFRConfig(**switches)
    of_term = {name.replace("smoothing", "mode"): value for name, value in switches.items()}
    with pytest.raises(ValueError, match=message.replace("smoothing", "mode")):
        DynamicLabelSmoothing(**{"mode": "none"} | of_term)


def test_its_weight_may_be_a_ramp() -> None:
    rising = sfr.SFRConfig(smoothing="past", num_samples=SAMPLES, alpha=0, early_learning=sfr.Ramp(0, 4, steps=2))
    assert sfr.SFRConfig.from_dict(json.loads(json.dumps(rising.to_dict()))) == rising
    ramped, plain = DynamicLabelSmoothing(**rising.of_labels()), [build(early_learning=w) for w in (0.0, 2.0, 4.0, 4.0)]
    for number in range(4):
        for before in plain[number:]:
            loss = before(*step(number))
            if before is plain[number]:
                torch.testing.assert_close(ramped(*step(number)), loss)


def test_of_few_classes_it_counts_less() -> None:
    """A network that says nothing yet is pulled towards chance by 1 / (K - 1) times what it is off."""
    for classes, share in ((2, 1 / 9), (4, 3 / 9), (10, 1.0), (40, 1.0)):
        logits, target, index = torch.randn(6, classes), torch.zeros(6).long(), torch.arange(6)
        added = build(early_learning=3.0)(logits, target, index) - F.cross_entropy(logits, target)
        means = 0.3 * logits.softmax(dim=1)
        expected = 3 * share * (1 - (means * logits.softmax(dim=1)).sum(dim=1)).log().mean()
        torch.testing.assert_close(added, expected, rtol=1e-2, atol=1e-4)


def clouds(classes: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of Gaussian clouds in fifty dimensions, (500, 50), their classes, and those with some wrong."""
    draws = torch.Generator().manual_seed(0)
    truth = torch.arange(500) % classes
    inputs = torch.randn(500, 50, generator=draws) + 0.5 * torch.randn(classes, 50, generator=draws)[truth]
    wrong = (truth + torch.randint(1, classes, (500,), generator=draws)) % classes
    return inputs, truth, wrong.where(torch.rand(500, generator=draws) < noise, truth)


def trained(inputs: Tensor, given: Tensor, weight: float, lr: float) -> Tensor:
    """What a network that can fit all labels says of the samples after 400 steps."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, int(given.max()) + 1))
    rising = sfr.Ramp(0, weight, steps=40)
    criterion = DynamicLabelSmoothing("past", num_samples=500, alpha=0.0, early_learning=rising, momentum=0.3)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(network(inputs), given, torch.arange(500)).backward()
        optimizer.step()
    return network(inputs).argmax(dim=1)


def test_wrong_labels_are_not_learned_by_heart() -> None:
    inputs, truth, given = clouds(classes=10, noise=0.4)
    plain, ours = (trained(inputs, given, weight, lr=0.1) for weight in (0.0, 3.0))
    assert (plain == given).float().mean() > 0.95
    assert (ours == truth).float().mean() > (plain == truth).float().mean() + 0.15


def test_two_classes_do_not_become_one() -> None:
    """What happened with the weight of ten classes to a network that learns slowly."""
    inputs, _, given = clouds(classes=2, noise=0.3)
    for lr in (0.1, 0.01, 0.001):
        said = trained(inputs, given, 3.0, lr)
        assert 0.3 < said.float().mean() < 0.7
