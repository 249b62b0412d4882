"""On a CUDA device: the same promises as on the CPU, and no wait for the device in a training step."""

from contextlib import contextmanager

import pytest
import torch

import sfr
from sfr.transport import solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def no_waiting():
    """Make every wait of the host for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", ["proximal", "sinkhorn"])
def test_plans_of_the_device_are_those_of_the_cpu(solver):
    cost = torch.rand(8, 16, 16)
    torch.testing.assert_close(
        solve(cost.cuda(), solver=solver).cpu(), solve(cost, solver=solver), rtol=1e-3, atol=1e-5
    )


def test_exact_plans_are_given_back_on_the_device():
    cost = torch.rand(8, 16, 16)
    assert torch.equal(solve(cost.cuda(), solver="exact").cpu(), solve(cost, solver="exact"))


@pytest.mark.parametrize("options", [{}, {"marginals": "cross"}, {"cost": "cosine", "grouping": "mean"}])
def test_a_training_step_never_waits_for_the_device(make_net, batch, options):
    images, labels = batch[0].cuda(), batch[1].cuda()
    model = sfr.SFRWrapper(make_net().cuda(), example_input=images, **options)
    criterion = sfr.SFRLoss(model)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        return loss

    step()  # creates what is created once
    with no_waiting():
        loss = step()
    assert loss.isfinite()


def test_the_loss_of_the_device_is_close_to_that_of_the_cpu(make_net, batch):
    net = make_net()
    losses = []
    for device in ("cpu", "cuda"):
        model = sfr.SFRWrapper(net.to(device), weight=1.0)
        criterion = sfr.SFRLoss(model)
        losses.append(criterion(model(batch[0].to(device)), batch[1].to(device)).item())
        model.unwrap()
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
