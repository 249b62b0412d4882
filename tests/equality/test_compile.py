"""Eager = compiled: wrapped before or after torch.compile, model or criterion or both, with and without fullgraph."""

import pytest
import torch

import sfr

COMPILE = {"backend": "aot_eager"}

# Dynamo looks at .grad of what it is given and hides this warning, which it cannot where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def train(model, criterion, parameters, batch):
    """Return the loss, the feature term and the gradients of three steps."""
    parameters = list(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    values = []
    for _ in range(3):
        loss = criterion(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        values += [loss.detach(), *(parameter.grad.clone() for parameter in parameters)]
        optimizer.step()
    return values


@pytest.fixture
def expected(make_net, batch):
    torch._dynamo.reset()
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    values = train(model, criterion, model.parameters(), batch)
    assert criterion.last.feature > 0
    return values, criterion.last.feature


@pytest.mark.parametrize("fullgraph", [False, True], ids=["default", "fullgraph"])
@pytest.mark.parametrize("way", ["wrapped, then compiled", "compiled, then wrapped", "in place"])
def test_a_compiled_model_trains_as_the_eager_one(make_net, batch, assert_equal, expected, way, fullgraph):
    options = {"example_input": batch[0]}
    if way == "compiled, then wrapped":
        model = wrapped = sfr.SFRWrapper(torch.compile(make_net(), fullgraph=fullgraph, **COMPILE), **options)
    elif way == "wrapped, then compiled":
        wrapped = sfr.SFRWrapper(make_net(), **options)
        model = torch.compile(wrapped, fullgraph=fullgraph, **COMPILE)
    else:
        model = wrapped = sfr.SFRWrapper(make_net(), **options)
        model.compile(fullgraph=fullgraph, **COMPILE)
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    values = train(model, criterion, wrapped.parameters(), batch)
    assert_equal((values, criterion.last.feature), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_criterion_gives_the_loss_of_the_eager_one(make_net, batch, assert_equal, expected):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    values = train(torch.compile(model, **COMPILE), torch.compile(criterion, **COMPILE), model.parameters(), batch)
    assert_equal((values, criterion.last.feature), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_step_gives_the_loss_of_the_eager_one(make_net, batch, assert_equal, expected):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model, feature_weight=1.0)
    loss_of = torch.compile(lambda logits, labels: criterion(model(logits), labels), **COMPILE)
    values = train(lambda images: images, loss_of, model.parameters(), batch)
    assert_equal((values, criterion.last.feature), expected, rtol=1e-5, atol=1e-6)
