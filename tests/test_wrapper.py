"""The wrapper records what the criterion needs, and is the plain model in every other way."""

import copy
import importlib
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import sfr


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def features_of(model):
    return model._sfr.recorder.features


@pytest.fixture
def net(make_net):
    return make_net()


def test_forward_gives_the_bits_of_the_plain_model(net, batch):
    expected = net(batch[0])
    model = sfr.SFRWrapper(net)
    for _ in range(2):  # the discovering forward, and one after it
        assert torch.equal(model(batch[0]), expected)


def test_names_of_parameters_modules_and_state_are_the_models_own():
    plain = models.resnet18(num_classes=3)
    expected = [
        [name for name, _ in plain.named_parameters()],
        [name for name, _ in plain.named_buffers()],
        [name for name, _ in plain.named_modules()],
        list(plain.state_dict()),
    ]
    model = sfr.SFRWrapper(plain, stages="layer.")
    assert expected == [
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
        [name for name, _ in model.named_modules()],
        list(model.state_dict()),
    ]
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_state_dict_loads_into_the_plain_model_and_back(make_net, batch):
    wrapped, plain = sfr.SFRWrapper(make_net()), make_net()
    plain.load_state_dict(wrapped.state_dict())
    assert torch.equal(plain(batch[0]), wrapped(batch[0]))
    other = make_net()
    wrapped.load_state_dict(other.state_dict())
    assert torch.equal(other(batch[0]), wrapped(batch[0]))


def test_parameters_of_the_models_own_root_are_shared(batch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("count", torch.zeros(()))
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2))

        def forward(self, x):
            self.count += 1
            return self.body(x).mean((2, 3)) * self.scale

    plain = Scaled()
    model = sfr.SFRWrapper(plain).double()
    assert plain.scale.dtype == plain.body[0].weight.dtype == torch.float64
    model(batch[0].double())
    assert model.count == plain.count == 1
    assert dict(model.named_parameters())["scale"] is plain.scale


def test_unwrap_returns_the_same_object_without_hooks(net, make_net, batch):
    model = sfr.SFRWrapper(net)
    model(batch[0])
    assert hooks_of(net)
    kind = type(model)
    assert model.unwrap() is net
    assert not hooks_of(net)
    assert type(net) is nn.Sequential
    assert kind is not nn.Sequential
    assert vars(net).keys() == vars(make_net()).keys()
    assert sfr.unwrap(net) is net  # of a plain model there is nothing to undo


@pytest.mark.parametrize("stages", [None, ["1", "3"]], ids=["discovering", "named"])
def test_no_hook_is_left_after_an_exception_in_the_middle_of_a_forward(net, batch, stages):
    model = sfr.SFRWrapper(net, stages=stages)
    with pytest.raises(RuntimeError):
        model(batch[0][:, :2])
    assert not features_of(model)
    plain = model.unwrap()
    assert not hooks_of(plain)
    assert plain(batch[0]).shape == (8, 10)


def test_training_goes_on_after_an_exception_in_a_forward(net, batch):
    model = sfr.SFRWrapper(net, stages=["1", "3"])
    criterion = sfr.SFRLoss(model)
    with pytest.raises(RuntimeError):
        model(batch[0][:, :2])
    criterion(model(batch[0]), batch[1]).backward()


def test_an_unwrapped_wrapper_does_not_train_silently_without_features(net, batch):
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model)
    model.unwrap()
    with pytest.raises(RuntimeError, match="no features are recorded"):
        criterion(model(batch[0]), batch[1])


def test_evaluation_and_no_grad_record_nothing(net, batch):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    model.eval()
    model(batch[0])
    assert not features_of(model)
    model.train()
    with torch.no_grad():
        model(batch[0])
    assert not features_of(model)


def test_features_are_released_after_use(net, batch):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    criterion = sfr.SFRLoss(model)
    logits = model(batch[0])
    feature = weakref.ref(features_of(model)["3"])
    loss = criterion(logits, batch[1])
    assert not features_of(model)
    loss.backward()
    del loss, logits
    assert feature() is None


def test_a_wrapper_without_its_criterion_warns_once(net, batch):
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model)

    def warnings_of(train_step, steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                train_step()
        return [str(warning.message) for warning in caught]

    def plain_step():
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    assert not warnings_of(lambda: criterion(model(batch[0]), batch[1]), 30)
    with model.disable():
        assert not warnings_of(plain_step, 30)
    assert not warnings_of(plain_step, 90)  # a criterion has used the features, so there may be a reason
    criterion(model(batch[0]), batch[1])
    [message] = warnings_of(plain_step, 110)
    assert "criterion = sfr.SFRLoss(model) takes the place of your loss" in message


def test_the_warning_of_unused_features_points_to_the_users_line(make_net, batch):
    plain = sfr.SFRWrapper(make_net())
    for model in (plain, nn.DataParallel(sfr.SFRWrapper(make_net()))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(35):
                model(batch[0])
        assert [warning.filename for warning in caught] == [__file__]


def test_an_example_input_leaves_mode_buffers_and_random_state_alone():
    plain = models.resnet18(num_classes=3)
    plain.layer1.eval()
    before, modes = copy.deepcopy(plain.state_dict()), [module.training for module in plain.modules()]
    state = torch.get_rng_state()
    sfr.SFRWrapper(plain, example_input=torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in plain.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_train_and_eval_reach_the_model(net):
    model = sfr.SFRWrapper(net)
    assert model.eval() is model
    assert not net.training
    assert not net[0].training
    model.train()
    assert net.training
    assert model.training


def test_attributes_are_read_from_and_written_to_the_model():
    plain = models.resnet18(num_classes=3)
    model = sfr.SFRWrapper(plain)
    assert model.fc is plain.fc
    assert model.inplanes == 512
    model.fc = nn.Linear(512, 7)
    model.note = "kept"
    assert plain.fc.out_features == 7
    assert plain.note == "kept"
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    del model.note
    assert not hasattr(plain, "note")
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such


def test_a_model_wrapped_again_has_the_new_settings(net, batch):
    for options in ({}, {"stages": ["1", "3"]}, {"example_input": batch[0], "layout": "channels_first"}):
        model = sfr.SFRWrapper(net, **options)
        criterion = sfr.SFRLoss(model)
        criterion(model(batch[0]), batch[1]).backward()
        assert model is net
        assert len(hooks_of(net)) == len(criterion.model.sfr.stage_names)
    assert model._sfr.settings.layout == "channels_first"
    assert type(model).__mro__.count(sfr.SFRWrapper) == 1


def test_a_criterion_made_with_other_settings_is_an_error_that_says_what_to_do(net, batch):
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model)
    model = sfr.SFRWrapper(model, stages=["1", "3"])
    with pytest.raises(RuntimeError, match=r"wrapped again, with other settings.*criterion = sfr\.SFRLoss\(model\)"):
        criterion(model(batch[0]), batch[1])
    criterion = sfr.SFRLoss(model)
    sfr.SFRWrapper(model, stages=["1", "3"])  # the same settings: a cell of a notebook that is run again
    criterion(model(batch[0]), batch[1]).backward()
    assert list(criterion.last.pairs) == ["1 <- 3"]


def test_a_criterion_of_another_model_is_an_error_that_says_so(make_net, batch):
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()))
    other = sfr.SFRWrapper(make_net())
    with pytest.raises(RuntimeError, match=r"belongs to the model it was made for.*make a new SFRLoss"):
        criterion(other(batch[0]), batch[1])
    criterion.model(batch[0])
    with pytest.raises(RuntimeError, match=r"belongs to the model it was made for.*make a new SFRLoss"):
        criterion(other(batch[0]), batch[1])


class SelfTeacher(nn.Module):
    """Runs its net once without gradient, and once with it."""

    def __init__(self, net, first):
        super().__init__()
        self.net, self.first = net, first

    def forward(self, x):
        if self.first == "without":
            with torch.no_grad():
                self.target = self.net(x.flip(-1))
        logits = self.net(x)
        if self.first == "with":
            with torch.no_grad():
                self.target = self.net(x.flip(-1))
        return logits


@pytest.mark.parametrize("first", ["without", "with"])
@pytest.mark.parametrize("stages", [None, ["net.1", "net.3"]])
def test_a_stage_that_also_runs_without_gradient_counts_where_it_has_one(net, batch, first, stages):
    model = sfr.SFRWrapper(SelfTeacher(net, first), stages=stages)
    criterion = sfr.SFRLoss(model)
    for _ in range(3):
        criterion(model(batch[0]), batch[1]).backward()
        assert criterion.last.feature > 0
    assert all(feature.requires_grad for feature in features_of(model).values())


class Siamese(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a, b):
        return self.net(a) - self.net(b)


def test_an_encoder_that_runs_twice_is_an_error_whose_advice_works(net, batch):
    model = sfr.SFRWrapper(Siamese(net))
    with pytest.raises(ValueError, match=r"ran more than once in the forward, as 'net.0'.*torch\.cat\(\[a, b\]\)"):
        model(batch[0], batch[0] + 1)
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model, label_loss=lambda output, _: (output[:8] - output[8:]).square().mean())
    criterion(model(torch.cat([batch[0], batch[0] + 1])), None).backward()
    assert criterion.last.feature > 0


def test_a_body_without_gradient_is_named_as_the_reason_for_too_few_stages(net, batch):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net[:-1], net[-1]

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    message = r"module\(s\) ran without gradient, as 'body\.0'.*use_reentrant=False.*torch\.no_grad\(\)"
    with pytest.raises(ValueError, match=message):
        sfr.SFRWrapper(Frozen())(batch[0])


def test_a_dropout_that_is_used_twice_is_not_the_reason_for_too_few_stages():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.head = nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.drop(self.first(self.drop(x)).relu()))

    with pytest.raises(ValueError, match=r"two are needed\. Name at least two") as raised:
        sfr.SFRWrapper(Net())(torch.randn(4, 8))
    assert "drop" not in str(raised.value)


def test_the_root_is_no_stage(net):
    with pytest.raises(ValueError, match="the model has no stage ''"):
        sfr.SFRWrapper(net, stages=["1", ""])


def test_settings_that_are_refused_leave_the_wrapping_of_before(net, batch):
    model = sfr.SFRWrapper(net, stages=["1", "3"])
    with pytest.raises(ValueError, match="no stage"):
        sfr.SFRWrapper(net, stages=["1", "no such"])
    with pytest.raises(RuntimeError):
        sfr.SFRWrapper(net, example_input=batch[0][:, :2])
    assert model.sfr.stage_names == ("1", "3")
    assert len(hooks_of(net)) == 2
    sfr.SFRLoss(model)(model(batch[0]), batch[1]).backward()


def test_a_wrapped_part_of_a_model_to_be_wrapped_is_an_error_that_says_how_to_undo_it(net, batch):
    whole = nn.Sequential(sfr.SFRWrapper(net))
    with pytest.raises(ValueError, match="a part of the model is wrapped already, '0'"):
        sfr.SFRWrapper(whole)
    sfr.unwrap(whole.get_submodule("0"))
    sfr.SFRWrapper(whole, example_input=batch[0])


def test_copies_of_data_parallel_are_refused_and_the_model_stays_whole(net, batch, monkeypatch):
    """What ``nn.DataParallel`` does on two GPUs, with the weights copied on the CPU."""
    replication = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replication, "_get_device_index", lambda device, _: device)
    copies = lambda tensors, devices, detach: [[each.clone() for each in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    assert len(replication.replicate(net, [0, 1])) == 2
    parts, weights = list(net.modules()), list(net.parameters())
    with pytest.raises(RuntimeError, match="DataParallel copies the model"):
        replication.replicate(sfr.SFRWrapper(net), [0, 1])
    assert all(a is b for a, b in zip(net.modules(), parts, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))


def test_data_parallel_inside_is_refused_over_several_gpus_only(net, batch):
    parallel = nn.DataParallel(net)  # without a GPU a plain container
    model = sfr.SFRWrapper(parallel)
    sfr.SFRLoss(model)(model(batch[0]), batch[1]).backward()
    model.unwrap().device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DistributedDataParallel .* It is at 'inner' of the model"):
        sfr.SFRWrapper(nn.ModuleDict({"inner": parallel}))


def test_data_parallel_around_the_wrapper_trains_on_one_device(net, batch):
    parallel = nn.DataParallel(sfr.SFRWrapper(net))
    sfr.SFRLoss(parallel)(parallel(batch[0]), batch[1]).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_only_modules_can_be_wrapped():
    with pytest.raises(TypeError, match=r"nn\.Module; got str"):
        sfr.SFRWrapper("resnet18")


def test_an_unknown_option_is_an_error(net):
    with pytest.raises(TypeError, match="lambda_"):
        sfr.SFRWrapper(net, lambda_=1)


def test_disable_makes_it_the_plain_model_and_the_plain_loss(net, batch):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    criterion = sfr.SFRLoss(model)
    with model.disable():
        logits = model(batch[0])
        loss = criterion(logits, batch[1])
        assert not features_of(model)
    assert torch.equal(loss, nn.functional.cross_entropy(logits, batch[1]))
    assert criterion.step == 0
    _ = model(batch[0])
    assert features_of(model)


def test_a_deep_copy_is_independent_also_between_forward_and_loss(net, batch):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    _ = model(batch[0])
    twin = copy.deepcopy(model)
    assert not features_of(twin)
    assert twin.unwrap() is not net
    twin = copy.deepcopy(model)
    criterion = sfr.SFRLoss(twin)
    criterion(twin(batch[0]), batch[1]).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(features_of(model)) == 3


def test_model_and_criterion_copied_together_stay_together(net, batch):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    twin, criterion = copy.deepcopy((model, sfr.SFRLoss(model)))
    assert criterion.model is twin
    criterion(twin(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_wrapped_model_can_be_saved_whole(net, batch, way):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    expected = model(batch[0])
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    output = twin(batch[0])
    assert torch.equal(output, expected)
    assert list(features_of(twin)) == ["1", "3", "5"]
    plain = twin.unwrap()
    assert type(plain) is nn.Sequential
    assert not hooks_of(plain)


class Outputs(nn.Module):
    """A net whose middle stage gives whatever is asked for."""

    def __init__(self, make):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 4, 3), Middle(make)
        self.last = nn.Conv2d(4, 8, 3, 2)

    def forward(self, x):
        self.middle(self.first(x))
        return self.last(self.first.weight.new_tensor(0) + self.first_output(x)).mean((2, 3))

    def first_output(self, x):
        return nn.functional.conv2d(x, self.first.weight)


class Middle(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: (None, x), id="tuple"),
        pytest.param(lambda x: [x, x + 1], id="list"),
        pytest.param(lambda x: {"mask": x > 0, "out": x}, id="dict"),
    ],
)
def test_the_first_floating_tensor_of_a_container_is_the_feature(batch, make):
    model = sfr.SFRWrapper(Outputs(make), stages=["first", "middle"])
    _ = model(batch[0])
    assert torch.equal(features_of(model)["middle"], features_of(model)["first"])


@pytest.mark.parametrize(
    ("make", "got"),
    [
        pytest.param(lambda x: None, "NoneType", id="None"),
        pytest.param(lambda x: "text", "str", id="str"),
        pytest.param(lambda x: x > 0, "one of torch.bool", id="bool"),
        pytest.param(lambda x: x.cfloat(), "one of torch.complex64", id="complex"),
    ],
)
def test_a_stage_without_a_floating_tensor_is_an_error_that_names_it(batch, make, got):
    model = sfr.SFRWrapper(Outputs(make), stages=["first", "middle"])
    with pytest.raises(TypeError, match=f"stage 'middle' returns no floating-point tensor but {got};"):
        model(batch[0])


def test_a_stage_that_fires_twice_is_an_error_that_names_it(batch):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = sfr.SFRWrapper(nn.Sequential(conv, conv, nn.Conv2d(3, 4, 3, 2)), stages=["0", "2"])
    with pytest.raises(RuntimeError, match="stage '0' fired twice"):
        model(batch[0])


def test_a_stage_that_does_not_fire_is_an_error_that_names_it(net, batch):
    model = sfr.SFRWrapper(net, stages=["1", "3", "5"])
    setattr(model, "3", nn.ReLU())
    with pytest.raises(RuntimeError, match=r"\['3'\] did not fire"):
        model(batch[0])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_wrapped_and_can_be_wrapped_again(net, batch, way):
    model = sfr.SFRWrapper(net, example_input=batch[0])
    twin = way(net)
    other = sfr.SFRWrapper(twin, example_input=batch[0])
    assert other is twin
    assert len(hooks_of(twin)) == len(hooks_of(net)) == 3
    _ = other(batch[0])
    assert len(features_of(other)) == 3
    assert not features_of(model)


def test_a_scripted_module_is_no_stage_and_disturbs_none(batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, 2)
            self.scripted = scripted(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()))
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.scripted(self.second(self.first(x))).mean((2, 3)))

    for options in ({}, {"stages": ["first", "second"]}, {"example_input": batch[0]}):
        model = sfr.SFRWrapper(Net(), **options)
        sfr.SFRLoss(model)(model(batch[0]), batch[1]).backward()
        assert model.sfr.stage_names == ("first", "second")
    for name in ("scripted", "scripted.0"):
        with pytest.raises(ValueError, match=rf"stage '{name}' is a ScriptModule.*before it is scripted"):
            sfr.SFRWrapper(Net(), stages=["first", name])
    with pytest.raises(TypeError, match=r"the model is a ScriptModule.*before it is scripted"):
        sfr.SFRWrapper(scripted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())))


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        return torch.jit.script(module)


def test_a_misspelled_option_is_an_error_with_the_near_name(net):
    with pytest.raises(TypeError, match=r"SFRWrapper has no argument \['layuot'\]; it has the near names 'layout'"):
        sfr.SFRWrapper(net, layuot="tokens")
    with pytest.raises(TypeError, match=r"\['exampel_input'\]; it has the near names 'example_input'"):
        sfr.SFRWrapper(net, exampel_input=torch.zeros(1))


def test_nothing_but_the_model_is_taken_by_position(net, batch):
    for other in (batch[0], 0.1, ["1", "3"]):
        message = rf"takes the model alone by position; got {type(other).__name__}.*example_input="
        with pytest.raises(TypeError, match=message):
            sfr.SFRWrapper(net, other)
