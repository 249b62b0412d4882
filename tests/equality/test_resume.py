"""A straight run = stop, save, load into fresh objects and resume."""

import io

import pytest
import torch

import sfr

SWITCHES = {
    "running": {"smoothing": "class_mean", "feature_weight": sfr.Ramp(0, 0.5, steps=6)},
    "epoch": {"smoothing": "class_mean", "update": "epoch", "feature_weight": 0.5},
    "past": {"smoothing": "past", "num_samples": 8, "feature_weight": 0.5},
    "schedule": {"smoothing": "uniform", "alpha": sfr.Ramp(0.3, 0.0, steps=7), "feature_weight": 0.5},
}


def new_run(make_net, switches):
    torch.manual_seed(1)
    model = sfr.SFRWrapper(make_net())
    return model, sfr.SFRLoss(model, **switches), torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def train(run, batches):
    model, criterion, optimizer = run
    losses = []
    for epoch in batches.chunk(2):
        for images in epoch:
            loss = criterion(model(images), torch.arange(8) % 3, index=torch.arange(8))
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if criterion.config.update == "epoch":
            criterion.end_epoch()
    return losses


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_resuming_continues_as_if_nothing_had_happened(make_net, assert_equal, switches):
    batches = torch.randn(8, 8, 3, 16, 16)
    straight = new_run(make_net, switches)
    expected = train(straight, batches[:4]) + train(straight, batches[4:])

    stopped = new_run(make_net, switches)
    losses = train(stopped, batches[:4])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = new_run(make_net, switches)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    losses += train(resumed, batches[4:])
    states = [part.state_dict() for part in resumed], [part.state_dict() for part in straight]
    assert_equal((losses, states[0]), (expected, states[1]))


def test_without_the_state_of_the_criterion_the_run_would_differ(make_net):
    batches = torch.randn(8, 8, 3, 16, 16)
    run = new_run(make_net, SWITCHES["running"])
    expected = train(run, batches[:4]) + train(run, batches[4:])
    run = new_run(make_net, SWITCHES["running"])
    losses = train(run, batches[:4])
    assert losses + train((run[0], sfr.SFRLoss(run[0], **SWITCHES["running"]), run[2]), batches[4:]) != expected
