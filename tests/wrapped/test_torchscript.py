"""A wrapped model is scripted and traced as the plain one, and goes on as before."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sfr


class Scripted(nn.Module):
    """Has state and a branch that only TorchScript keeps."""

    def __init__(self, net):
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x):
        if x.mean() > 0:
            x = -x
        return self.net(x) * self.scale + self.shift


def quiet(convert, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated, and a trace warns of branches
        return convert(*arguments)


CONVERT = {
    "script": lambda model, x: quiet(torch.jit.script, model),
    "trace": lambda model, x: quiet(torch.jit.trace, model, x),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("convert", CONVERT.values(), ids=CONVERT)
def test_a_wrapped_model_is_converted_as_the_plain_one(make_net, batch, convert, when, training):
    plain = Scripted(make_net())
    model = sfr.SFRWrapper(copy.deepcopy(plain))
    criterion = sfr.SFRLoss(model)
    if when == "after":
        criterion(model(batch[0]), batch[1]).backward()
        model.zero_grad()
    converted = convert(model.train(training), batch[0])
    assert torch.equal(converted(batch[0]), plain(batch[0]))
    assert list(converted.state_dict()) == list(plain.state_dict())
    model.train()
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0


def test_what_is_scripted_shares_the_weights_as_it_does_of_a_plain_model(make_net, batch):
    model = sfr.SFRWrapper(Scripted(make_net()), example_input=batch[0])
    scripted = CONVERT["script"](model, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.9
        model.shift += 1
    assert torch.equal(scripted(batch[0]), model(batch[0]))


def test_a_model_that_holds_a_wrapped_one_is_scripted(make_net, batch):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0])
    scripted = CONVERT["script"](nn.Sequential(nn.Identity(), model), None)
    assert torch.equal(scripted(batch[0]), model(batch[0]))
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0


def test_what_a_model_does_itself_to_be_scripted_is_done(make_net, batch):
    class Prepared(Scripted):
        def __prepare_scriptable__(self):
            return nn.Sequential(self.net, nn.Flatten())

    model = sfr.SFRWrapper(Prepared(make_net()), example_input=batch[0])
    assert torch.equal(CONVERT["script"](model, None)(batch[0]), model.net(batch[0]))
