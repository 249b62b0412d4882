"""Wrapped with weight 0 and hard labels = vanilla training, bit for bit."""

import copy

import torch
import torch.nn.functional as F

import sfr


def train(model, criterion, images, labels, steps=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = criterion(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, copy.deepcopy(model.state_dict())


def test_weight_zero_and_hard_labels_are_vanilla(make_net, batch):
    net = make_net()
    model = sfr.SFRWrapper(copy.deepcopy(net), weight=0, smoothing="none")
    losses, state = train(model, sfr.SFRLoss(model), *batch)
    expected_losses, expected_state = train(net, F.cross_entropy, *batch)
    assert losses == expected_losses
    assert all(torch.equal(state[name], expected_state[name]) for name in expected_state)


def test_a_positive_weight_is_not_vanilla(make_net, batch):
    net = make_net()
    model = sfr.SFRWrapper(copy.deepcopy(net), weight=0.1, smoothing="none")
    assert train(model, sfr.SFRLoss(model), *batch)[0] != train(net, F.cross_entropy, *batch)[0]
