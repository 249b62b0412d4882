"""Presets: which switches a purpose has, that training takes them, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

import sfr
from sfr.config import Ramp, SFRConfig


def test_few_labels_move_towards_past_predictions_over_the_whole_training() -> None:
    config = SFRConfig.preset("few-labels", num_samples=500, steps=400)
    assert config == SFRConfig(smoothing="past", num_samples=500, alpha=Ramp(0, 0.8, steps=400))


@pytest.mark.parametrize(("steps", "rise"), [(400, 40), (3, 1)])
def test_with_wrong_labels_the_network_keeps_to_what_it_said(steps: int, rise: int) -> None:
    config = SFRConfig.preset("noisy-labels", num_samples=500, steps=steps)
    early = Ramp(0, 3, steps=rise)
    assert config == SFRConfig(smoothing="past", num_samples=500, alpha=0.0, early_learning=early)


def test_a_switch_replaces_that_of_the_preset() -> None:
    config = SFRConfig.preset("noisy-labels", num_samples=500, steps=400, alpha=0.5, feature_weight=0)
    assert (config.alpha, config.feature_weight, config.smoothing) == (0.5, 0, "past")


@pytest.mark.parametrize(
    ("purpose", "changes", "error", "told"),
    [
        ("fine-tune", {}, ValueError, "purpose must be one of 'few-labels', 'noisy-labels'"),
        ("few-labels", {"steps": 0}, ValueError, "steps must be"),
        ("noisy-labels", {"steps": 2.5}, TypeError, "steps must be an integer"),
        ("noisy-labels", {"num_samples": None}, ValueError, "num_samples must be given"),
        ("noisy-labels", {"wieght": 1}, ValueError, "no field.*wieght"),
    ],
)
def test_what_does_not_fit_is_refused(purpose: Any, changes: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        SFRConfig.preset(purpose, **{"num_samples": 5, "steps": 10} | changes)


@pytest.mark.parametrize("purpose", ["few-labels", "noisy-labels"])
def test_a_training_takes_a_preset(make_net: Any, batch: tuple[torch.Tensor, torch.Tensor], purpose: Any) -> None:
    images, target = batch
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, SFRConfig.preset(purpose, num_samples=len(images), steps=8))
    losses = [criterion(model(images), target, index=torch.arange(len(images))) for _ in range(2)]  # rising from 0
    plain = nn.functional.cross_entropy(model(images), target)
    weighted = criterion.last.weight * criterion.last.feature
    assert (losses[1] - weighted - plain).abs() > 1e-5  # the second step knows what was said in the first
