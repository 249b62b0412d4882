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


def test_noisy_labels_move_towards_past_predictions_from_the_start() -> None:
    config = SFRConfig.preset("noisy-labels", num_samples=500)
    assert config == SFRConfig(smoothing="past", num_samples=500, alpha=0.8)


def test_a_switch_replaces_that_of_the_preset() -> None:
    config = SFRConfig.preset("noisy-labels", num_samples=500, alpha=0.5, feature_weight=0)
    assert (config.alpha, config.feature_weight, config.smoothing) == (0.5, 0, "past")


@pytest.mark.parametrize(
    ("purpose", "arguments", "error", "told"),
    [
        ("fine-tune", {"num_samples": 5}, ValueError, "purpose must be one of 'few-labels', 'noisy-labels'"),
        ("few-labels", {"num_samples": 5}, ValueError, "steps.*must be given"),
        ("noisy-labels", {"num_samples": 5, "steps": 7}, ValueError, "steps.*only then; got 7"),
        ("few-labels", {"num_samples": 5, "steps": 0}, ValueError, "steps must be"),
        ("few-labels", {"num_samples": 5, "steps": 2.5}, TypeError, "steps must be an integer"),
        ("noisy-labels", {"num_samples": None}, ValueError, "num_samples must be given"),
        ("noisy-labels", {"num_samples": 5, "wieght": 1}, ValueError, "no field.*wieght"),
    ],
)
def test_what_does_not_fit_is_refused(purpose: Any, arguments: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        SFRConfig.preset(purpose, **arguments)


@pytest.mark.parametrize("steps", [None, 6])
def test_a_training_takes_a_preset(make_net: Any, batch: tuple[torch.Tensor, torch.Tensor], steps: int | None) -> None:
    images, target = batch
    purpose = "noisy-labels" if steps is None else "few-labels"
    given = {} if steps is None else {"steps": steps}
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, SFRConfig.preset(purpose, num_samples=len(images), **given))
    losses = []
    for _ in range(2):
        losses.append(criterion(model(images), target, index=torch.arange(len(images))))
    plain = nn.functional.cross_entropy(model(images), target)
    weighted = criterion.last.weight * criterion.last.feature
    assert (losses[1] - weighted - plain).abs() > 1e-5  # the second step knows what was said in the first
