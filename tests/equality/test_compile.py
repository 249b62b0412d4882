"""Eager = compiled: the feature term is not lost in a compiled model, and gradients are the same."""

import pytest
import torch

import sfr


def loss_and_gradients(model, criterion, batch):
    model.zero_grad()
    loss = criterion(model(batch[0]), batch[1])
    loss.backward()
    return [loss.detach(), criterion.last.feature, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_wrapper_gives_loss_and_gradients_of_the_eager_one(make_net, batch, fullgraph):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0], weight=1.0)
    expected = loss_and_gradients(model, sfr.SFRLoss(model), batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    criterion = sfr.SFRLoss(compiled)
    for _ in range(2):
        actual = loss_and_gradients(compiled, criterion, batch)
        criterion.load_state_dict(sfr.SFRLoss(model).state_dict())  # label statistics of a first step again
        torch.testing.assert_close(actual, expected)
    assert expected[1] > 0


def test_stages_cannot_be_discovered_while_compiling(make_net, batch):
    torch._dynamo.reset()
    compiled = torch.compile(sfr.SFRWrapper(make_net()), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"pass example_input= or stages=|_discovering_forward"):
        compiled(batch[0])
