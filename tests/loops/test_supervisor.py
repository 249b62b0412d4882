"""Another network, as a slow average of the weights, supervises in place of the model's own deep features."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sfr
from sfr.feature.term import feature_terms

STAGES = ["1", "3", "5"]


def average(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def maps_of(net, images):
    found = {}
    for i, layer in enumerate(net):
        images = layer(images)
        if str(i) in STAGES:
            found[str(i)] = images
    return found


def expected_terms(net, other, images):
    """Recompute the pairs by hand: a shallow map of the model, a deep one of the other network."""
    own, deep = maps_of(net, images), maps_of(other, images)
    pairs = [("1", "3"), ("1", "5"), ("3", "5")]
    return [feature_terms({"a": own[i], "b": deep[j].detach()})["a <- b"].values.mean() for i, j in pairs]


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_the_deep_side_is_that_of_the_supervisor(make_net, batch, wrapped_first, found):
    net, other = make_net(), make_net()
    model = sfr.SFRWrapper(net, stages=None if found else STAGES)
    slow = average(model if wrapped_first else copy.deepcopy(net))
    slow.module.load_state_dict(other.state_dict())
    criterion = sfr.SFRLoss(model, supervisor=slow, feature_weight=1.0, gate="none")
    plain = copy.deepcopy(sfr.unwrap(copy.deepcopy(model)))
    loss = criterion(model(batch[0]), batch[1])
    terms = expected_terms(plain, other, batch[0])
    torch.testing.assert_close(loss, F.cross_entropy(plain(batch[0]), batch[1]) + sum(terms) / 3)
    loss.backward()
    (F.cross_entropy(plain(batch[0]), batch[1]) + sum(expected_terms(plain, other, batch[0])) / 3).backward()
    for own, by_hand in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, by_hand.grad, rtol=1e-4, atol=1e-6)
    assert all(each.grad is None for each in slow.parameters())
    assert next(iter(criterion.last.pairs)) == "1 <- 3 of the supervisor"


def test_a_copy_with_the_same_weights_gives_the_loss_without_a_supervisor(make_net, batch):
    net = make_net()
    model = sfr.SFRWrapper(net, stages=STAGES)
    with_copy = sfr.SFRLoss(model, supervisor=copy.deepcopy(net))
    alone = sfr.SFRLoss(model)
    torch.testing.assert_close(with_copy(model(batch[0]), batch[1]), alone(model(batch[0]), batch[1]))


def test_a_loop_with_an_average_trains_and_the_average_follows(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    slow, before = average(model), copy.deepcopy(model.state_dict())
    criterion = sfr.SFRLoss(model, supervisor=slow)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = criterion(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slow.update_parameters(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(slow.module[0].weight, before["0.weight"])
    assert not torch.equal(slow.module[0].weight, model[0].weight)


def test_keywords_several_inputs_and_the_mode_reach_the_supervisor(make_net, batch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.modes = make_net(), []

        def forward(self, images, *, scale):
            self.modes.append(self.training)
            return self.net(images * scale)

    model = sfr.SFRWrapper(Scaled(), stages=["net.1", "net.3"])
    slow = copy.deepcopy(sfr.unwrap(copy.deepcopy(model))).eval()
    criterion = sfr.SFRLoss(model, supervisor=slow)
    alone = sfr.SFRLoss(model)
    loss = criterion(model(batch[0], scale=3.0), batch[1])
    torch.testing.assert_close(loss, alone(model(batch[0], scale=3.0), batch[1]))
    assert slow.modes == [False]


def test_it_runs_once_a_step_and_not_in_evaluation(make_net, batch):
    model, calls = sfr.SFRWrapper(make_net(), stages=STAGES), []
    slow = average(copy.deepcopy(model))
    slow.module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    criterion = sfr.SFRLoss(model, supervisor=slow)
    output = model(batch[0])
    loss = 0.3 * criterion(output, batch[1]) + 0.7 * criterion(output, batch[1].flip(0))  # MixUp
    loss.backward()
    assert calls == [False]
    with torch.no_grad():
        criterion(model(batch[0]), batch[1])
    with model.disable():
        criterion(model(batch[0]), batch[1])
    assert calls == [False]


def test_under_autocast_the_supervisor_runs_in_the_same_precision(make_net, batch):
    model, dtypes = sfr.SFRWrapper(make_net(), stages=STAGES), []
    slow = copy.deepcopy(model)
    slow[2].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    criterion = sfr.SFRLoss(model, supervisor=slow)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch[0])
    criterion(output, batch[1]).backward()
    criterion(model(batch[0]), batch[1]).backward()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_inputs_are_let_go_of(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    criterion = sfr.SFRLoss(model, supervisor=copy.deepcopy(model))
    images = batch[0].clone()
    gone = weakref.ref(images)
    criterion(model(images), batch[1]).backward()
    del images
    gc.collect()
    assert gone() is None
    model(batch[0])
    pickle.loads(pickle.dumps(model))
    assert copy.deepcopy(model).sfr.stage_names == tuple(STAGES)


def test_a_model_compiled_in_place_is_supervised(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    criterion = sfr.SFRLoss(model, supervisor=copy.deepcopy(model))
    expected = criterion(model(batch[0]), batch[1])
    model.compile(backend="eager")
    torch.testing.assert_close(criterion(model(batch[0]), batch[1]), expected)


# Dynamo looks at .grad of what it is given and hides this warning, which it cannot where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_from_outside_is_an_error_that_says_what_to_do(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    criterion = sfr.SFRLoss(model, supervisor=copy.deepcopy(model))
    compiled = torch.compile(model, backend="eager")
    compiled(batch[0])  # watched, and so eager
    output = compiled(batch[0])
    with pytest.raises(RuntimeError, match=r"model\.compile\(\)"):
        criterion(output, batch[1])
    torch._dynamo.reset()


def test_what_cannot_supervise_is_refused(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    with pytest.raises(TypeError, match=r"AveragedModel.*got 0\.999"):
        sfr.SFRLoss(model, supervisor=0.999)
    with pytest.raises(ValueError, match="got the model itself"):
        sfr.SFRLoss(model, supervisor=model)
    with pytest.raises(TypeError, match="supervisor"):
        sfr.SFRLoss(model, superviser=copy.deepcopy(model))
    criterion = sfr.SFRLoss(model, supervisor=nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))
    with pytest.raises(ValueError, match="a Sequential, has no stage '3'"):
        criterion(model(batch[0]), batch[1])


def test_a_stage_that_the_supervisor_skips_is_an_error(make_net, batch):
    class Short(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    criterion = sfr.SFRLoss(model, supervisor=Short(*make_net()))
    with pytest.raises(RuntimeError, match=r"\['3', '5'\] of the supervisor did not run"):
        criterion(model(batch[0]), batch[1])
    assert not any(layer._forward_hooks for layer in criterion._supervisor.network)


def test_the_report_of_a_supervised_model_has_the_cost_of_both(make_net, batch):
    model = sfr.SFRWrapper(make_net(), stages=STAGES)
    slow, calls = copy.deepcopy(model), []
    slow.register_forward_pre_hook(lambda *_: calls.append(1))
    assert sfr.SFRLoss(model, supervisor=slow).report(batch[0], repeats=2).pairs
    assert len(calls) >= 2
