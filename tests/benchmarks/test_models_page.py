"""The hundred steps of the zoo: what is measured, and what the page says of it."""

import pytest
import torch
from torch import nn

from benchmarks.models import memorise, page


@pytest.fixture
def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
    )


def test_both_copies_learn_and_the_network_stays_as_it_was(small, monkeypatch):
    monkeypatch.setattr(memorise, "STEPS", 40)
    monkeypatch.setattr(memorise, "RATE", 1e-2)
    before = [parameter.clone() for parameter in small.parameters()]
    result = memorise.memorise(small, torch.randn(4, 3, 9, 9), torch.tensor([1, 2, 3, 4]), lambda output: output)
    assert all(map(torch.equal, before, small.parameters()))
    assert result["plain_accuracy"] == result["sfr_accuracy"] == 1
    assert 0 < result["first_share"] < 0.2
    assert 0 < result["last_term"] <= result["largest_term"] < 2


def test_the_page_counts_the_networks_that_fit_without_sfr_and_not_with_it():
    found = {"first_share": 0.02, "last_share": 0.5, "largest_term": 0.3, "last_term": 0.1}
    models = {
        "timm.a/fits": {"training": found | {"plain_accuracy": 1.0, "sfr_accuracy": 1.0}},
        "timm.a/behind": {"training": found | {"plain_accuracy": 1.0, "sfr_accuracy": 0.5}},
        "timm.a/fits_neither": {"training": found | {"plain_accuracy": 0.3, "sfr_accuracy": 0.3}},
        "timm.a/broken": {"training": {"error": "ValueError: no"}},
        "timm.a/not_trained": {},
    }
    where = {"versions": {"torch": "2"}, "device": "a CPU", "commit": "c", "date": "d"}
    text = " ".join(page.training_part({"models": models, "training_environment": where}).split())
    assert "4 of 5 models were trained" in text
    assert "of 2 that learn the batch by heart without sfr, 1 do not with it" in text
    assert "| timm.a/behind | 100% | 50% | 2.0% | 50.0% | 0.3 | 0.1 |" in text
    assert "| timm.a/broken | **fails**: ValueError: no |" in text


def test_a_page_without_trained_networks_begins_with_its_title():
    assert page.training_part({"models": {"timm.a/b": {}}}) == "# Models"
