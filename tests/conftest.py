"""Shared by all tests: one thread per worker, fixed seeds, small models."""

import gc

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
collect_ignore = ["shared"]  # no doctests in what other tests import


def pytest_collection_finish() -> None:
    """Frameworks and tests stay: a collection of garbage, which some tests ask for, need not look at them."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_net():
    """Return a builder of small convolutional classifiers of three stages: children '1', '3', '5'."""

    def build(classes: int = 10) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        )

    return build


@pytest.fixture
def batch():
    """Eight images of 16 x 16 and their labels out of ten."""
    return torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
