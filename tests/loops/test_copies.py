"""Copies of a wrapped model: deepcopy, averages, functional calls, pickle, files; none shares features with another."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sfr


class Scaled(nn.Module):
    """Has a parameter of its own, next to those of its parts, as vision transformers do."""

    def __init__(self, net):
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.net(x * self.scale)


@pytest.fixture
def model(make_net, batch):
    return sfr.SFRWrapper(Scaled(make_net()), example_input=batch[0])


def criterion_of(model, **switches):
    return sfr.SFRLoss(model, **{"feature_weight": 1.0, **switches})


class Run:
    """A model with its criterion and optimizer, trained on batches of a seed."""

    def __init__(self, model, criterion=None):
        self.model, self.criterion = model, criterion or criterion_of(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(self, seed, steps=2):
        images = torch.randn(steps, 8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        losses = []
        for batch in images:
            loss = self.criterion(self.model(batch), torch.arange(8))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def saved(thing, **options):
    """Return what torch.load makes of a file of the thing."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def through_a_file(thing):
    return saved(thing, weights_only=False)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = [copy.deepcopy, through_pickle, through_a_file]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("discovered", [True, False], ids=["after discovery", "before discovery"])
def test_a_copy_made_while_training_goes_on_as_the_original_would_have(make_net, copied, discovered):
    run = Run(sfr.SFRWrapper(make_net()))
    if discovered:
        run.train(seed=0)
    twin = copied(run)
    expected = run.train(seed=1)
    assert twin.train(seed=1) == expected
    for one, other in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_and_its_original_train_in_turns_without_touching_each_other(make_net, copied):
    expected = Run(sfr.SFRWrapper(make_net()))
    torch.manual_seed(0)
    run = Run(sfr.SFRWrapper(make_net()))
    run.model.load_state_dict(expected.model.state_dict())
    losses = [expected.train(seed) for seed in range(3)]
    twin = copied(run)
    for seed in range(3):
        assert run.train(seed) == losses[seed]
        twin.train(seed + 10)


def test_a_copy_between_forward_and_loss_takes_no_features(model, batch):
    logits = model(batch[0])
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion_of(twin)(logits, batch[1])
    criterion_of(model)(logits, batch[1]).backward()


def test_features_of_a_copy_do_not_serve_the_original(model, batch):
    twin = copy.deepcopy(model)
    logits = twin(batch[0])
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion_of(model)(logits, batch[1])


@pytest.mark.parametrize("average", ["SWA", "EMA"])
def test_the_average_of_a_wrapped_model_is_that_of_the_plain_one(make_net, batch, average):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if average == "EMA" else {}
    plain = make_net()
    wrapped = sfr.SFRWrapper(copy.deepcopy(plain))
    averages = []
    for model, criterion in ((plain, F.cross_entropy), (wrapped, criterion_of(wrapped, feature_weight=0))):
        averaged = AveragedModel(model, **options)
        run = Run(model, criterion)
        for seed in range(3):
            run.train(seed)
            averaged.update_parameters(model)
        averages.append(averaged)
    expected, actual = (averaged.state_dict() for averaged in averages)
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(averages[1].eval()(batch[0]), averages[0].eval()(batch[0]))


def test_an_average_evaluates_and_updates_its_statistics_without_recording(batch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.Flatten(2))
    model = sfr.SFRWrapper(net, example_input=batch[0])
    averaged = AveragedModel(model)
    logits = model(batch[0])
    update_bn([batch[0]], averaged)
    averaged.eval()(batch[0])
    assert not averaged.module._sfr.recorder.features
    assert model.sfr.take_features(logits)  # those of the trained model are untouched
    assert averaged.module.get_submodule("1").running_mean.abs().sum() > 0


def test_an_average_can_be_trained_itself(model, batch):
    averaged = AveragedModel(model)
    criterion = criterion_of(averaged)
    criterion(averaged(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("copied", [lambda model: model, *COPIES])
def test_a_functional_call_gives_the_loss_and_the_gradients_of_the_given_parameters(model, batch, copied):
    model = copied(model)
    other = {name: (parameter.detach() * 0.9).requires_grad_() for name, parameter in model.named_parameters()}
    loss = criterion_of(model)(functional_call(model, other, (batch[0],)), batch[1])
    gradients = torch.autograd.grad(loss, list(other.values()))
    assert all(parameter.grad is None for parameter in model.parameters())

    model.load_state_dict(other)
    expected = criterion_of(model)(model(batch[0]), batch[1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(model.parameters())))


@pytest.mark.parametrize("update", ["running", "epoch"])
def test_state_dicts_load_with_weights_only(make_net, batch, update):
    def new_run():
        model = sfr.SFRWrapper(make_net())
        rising = sfr.Ramp(0, 0.25, steps=5)
        return Run(model, criterion_of(model, smoothing="class_mean", update=update, feature_weight=rising))

    run = new_run()
    run.train(seed=0)
    resumed = new_run()
    for part in ("model", "criterion", "optimizer"):
        state = saved(getattr(run, part).state_dict(), weights_only=True)
        getattr(resumed, part).load_state_dict(state)
    assert resumed.train(seed=1) == run.train(seed=1)


def test_a_saved_state_passes_between_wrapped_and_plain_models(make_net, model, batch):
    plain = Scaled(make_net())
    plain.load_state_dict(saved(model.state_dict(), weights_only=True))
    assert torch.equal(plain(batch[0]), model(batch[0]))
    again = sfr.SFRWrapper(Scaled(make_net()))
    again.load_state_dict(saved(plain.state_dict(), weights_only=True))
    assert torch.equal(again(batch[0]), model(batch[0]))
    unwrapped = through_a_file(model.unwrap())
    assert type(unwrapped) is Scaled
    assert not any(module._forward_hooks for module in unwrapped.modules())
    assert torch.equal(unwrapped(batch[0]), plain(batch[0]))


class Parametrized(Scaled):
    """Says itself how it is copied."""

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


@pytest.mark.parametrize("kind", [Scaled, Parametrized], ids=["as usual", "by its own rule"])
@pytest.mark.parametrize("discovered", [True, False], ids=["after discovery", "before discovery"])
def test_a_shallow_copy_trains_and_is_unwrapped_without_the_original_and_the_other_way_round(
    make_net, batch, kind, discovered
):
    def trains(model):
        criterion = sfr.SFRLoss(model)
        criterion(model(batch[0]), batch[1]).backward()
        return len(criterion.last.pairs) == 3

    model = sfr.SFRWrapper(kind(make_net()), **({"example_input": batch[0]} if discovered else {}))
    first, second = copy.copy(model), copy.copy(model)
    assert isinstance(first, kind)
    assert first.scale is model.scale
    assert trains(first)
    assert trains(model)
    assert type(first.unwrap()) is kind
    assert trains(model)
    model.unwrap()
    assert trains(second)
    second.unwrap()
    assert not any(module._forward_hooks for module in model.modules())
