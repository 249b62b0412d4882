"""Training forwards that no criterion sees: they keep nothing alive, and disturb no later step."""

import gc
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfr


@dataclass
class Output:
    logits: torch.Tensor


class Returning(nn.Module):
    """A net whose output comes in some container."""

    def __init__(self, net, contain):
        super().__init__()
        self.net, self.contain = net, contain

    def forward(self, x):
        return self.contain(self.net(x))


CONTAINERS = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, logits * 2),
    "dict": lambda logits: {"logits": logits},
    "dataclass": Output,
}


@pytest.fixture(params=CONTAINERS.values(), ids=CONTAINERS)
def model(make_net, batch, request):
    return sfr.SFRWrapper(Returning(make_net(), request.param), example_input=batch[0])


def logits_in(output):
    if isinstance(output, Output):
        return output.logits
    return output if isinstance(output, torch.Tensor) else output["logits"] if isinstance(output, dict) else output[0]


def watched(model, name="net.2"):
    """Return the list that references to the outputs of a layer, which only the graph holds, are put into."""
    outputs = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    model.get_submodule("net.3").register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    return outputs


def alive(outputs):
    gc.collect()
    return [reference() for reference in outputs if reference() is not None]


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_forward_whose_output_is_dropped_keeps_no_graph(model, batch, forwards):
    outputs = watched(model)
    for _ in range(forwards):
        model(batch[0])
        assert not alive(outputs)


def test_features_are_there_as_long_as_something_computed_from_the_output_is(model, batch):
    outputs = watched(model)
    scaled = logits_in(model(batch[0])).float() * 2
    gc.collect()
    criterion = sfr.SFRLoss(model)
    criterion(scaled, batch[1]).backward()
    assert criterion.last.feature > 0
    del scaled
    assert not alive(outputs)


def test_a_loss_without_the_criterion_keeps_nothing_once_it_is_gone(model, batch):
    outputs = watched(model)
    loss = F.cross_entropy(logits_in(model(batch[0])), batch[1])
    loss.backward()
    del loss
    assert not alive(outputs)


def test_the_features_before_are_released_when_the_next_forward_begins(make_net, batch):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0])
    before = model(batch[0])
    features = [weakref.ref(feature) for feature in model._sfr.recorder.features.values()]
    before.sum().backward()
    model(batch[0])
    assert not alive(features)


def test_a_generators_step_through_the_model_leaves_its_own_step_alone(make_net, batch):
    """The generator's loss goes through the model without the criterion, then the weights change, then its own step."""
    losses = []
    for through in (False, True):
        torch.manual_seed(0)
        model = sfr.SFRWrapper(make_net(), example_input=batch[0])
        criterion, optimizer = sfr.SFRLoss(model), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            made = batch[0].clone().requires_grad_()
            if through:
                (-model(made).mean()).backward()
                assert made.grad.any()
                optimizer.zero_grad()
            loss = criterion(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert criterion.last.feature > 0
        losses.append(loss.detach())
    assert losses[0] == losses[1]


def test_dropped_forwards_still_count_as_unused(make_net, batch):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(35):
            model(batch[0])
    assert ["forwards in a row were not used" in str(warning.message) for warning in caught] == [True]


def test_an_attack_of_many_forwards_before_each_step_gives_no_alarm(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            attacked = batch[0].clone().requires_grad_()
            for _ in range(20):
                (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(attacked), batch[1]), attacked)
                attacked = (attacked + 0.01 * gradient.sign()).detach().requires_grad_()
            criterion(model(attacked), batch[1]).backward()
            assert criterion.last.terms
