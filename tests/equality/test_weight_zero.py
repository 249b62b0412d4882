"""Wrapped with weight 0 and hard labels = vanilla training, with batch statistics and dropout too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


def train(model, criterion, images, labels, steps=5):
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = criterion(model(images), labels)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, copy.deepcopy(model.state_dict())


def batch_norm_and_dropout():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 10)),
    )


@pytest.mark.parametrize("kind", ["group norm", "batch norm and dropout"])
def test_weight_zero_and_hard_labels_are_vanilla(make_net, batch, assert_equal, kind):
    net = make_net() if kind == "group norm" else batch_norm_and_dropout()
    model = sfr.SFRWrapper(copy.deepcopy(net))
    assert_equal(
        train(model, sfr.SFRLoss(model, feature_weight=0, smoothing="none"), *batch),
        train(net, F.cross_entropy, *batch),
    )


def test_a_positive_weight_is_not_vanilla(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    losses, _ = train(model, sfr.SFRLoss(model, feature_weight=0.1, smoothing="none"), *batch)
    assert losses != train(make_net(), F.cross_entropy, *batch)[0]
