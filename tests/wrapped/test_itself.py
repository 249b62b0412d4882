"""Whatever asks a wrapped model what it is gets the answer of the plain one."""

import abc
import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import sfr


def train_step(model, batch, **options):
    """Wrap a model and train it for one step; return it, once its feature term has been seen to count."""
    model = sfr.SFRWrapper(model, **options)
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    return model


class Body(nn.Module):
    """A plain net with what users add to theirs."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 3, 2)
        self.head = nn.Linear(2 * width, 10)
        self._scale = 1.0
        self.moved = torch.zeros(())

    def forward(self, pixel_values, labels=None, *, bias: float = 0.0):
        x = self.second(self.first(pixel_values).relu()).relu()
        return self.head(x.mean((2, 3))) * self._scale + bias

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.moved = fn(self.moved)
        return self


def test_the_model_is_wrapped_in_place_and_keeps_its_names():
    plain = Body()
    model = sfr.SFRWrapper(plain, stages=["first", "second"])
    assert model is plain
    assert isinstance(model, Body)
    assert isinstance(model, sfr.SFRWrapper)
    kind = type(model)
    assert (kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__) == ("Body", "Body", __name__, Body.__doc__)
    assert repr(model) == repr(Body())
    assert inspect.signature(model.forward) == inspect.signature(Body().forward)
    assert type(model.unwrap()) is Body


def test_private_attributes_reach_the_model(batch):
    model = sfr.SFRWrapper(Body())
    model._scale = 0.0
    assert not model(batch[0]).any()
    del model._scale
    with pytest.raises(AttributeError, match="_scale"):
        model(batch[0])


def test_an_apply_of_the_models_own_is_called(batch):
    model = sfr.SFRWrapper(Body()).double()
    assert model.moved.dtype == torch.float64
    assert model.to("meta").moved.is_meta


@pytest.mark.parametrize("name", ["stage", "report", "disabled", "disable", "stage_names", "sfr", "unwrap", "config"])
@pytest.mark.parametrize("kind", ["attribute", "submodule", "buffer", "parameter", "method", "__getattr__"])
def test_a_name_of_the_models_own_is_the_models(batch, name, kind):
    values = {
        "attribute": 3,
        "submodule": nn.Identity(),
        "buffer": torch.zeros(2),
        "parameter": nn.Parameter(torch.zeros(2)),
    }

    class Net(Body):
        def __getattr__(self, asked):
            return "found" if kind == "__getattr__" and asked == name else super().__getattr__(asked)

    if kind == "method":
        setattr(Net, name, lambda self: "called")
    net = Net()
    if kind == "buffer":
        net.register_buffer(name, values[kind])
    elif kind in values:
        setattr(net, name, values[kind])
    expected = getattr(net, name)
    model = sfr.SFRWrapper(net)
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert getattr(model, name) == expected if kind == "method" else getattr(model, name) is expected
    assert criterion.last.feature > 0
    assert sfr.unwrap(model) is net
    assert type(net) is Net


def test_what_is_not_there_is_missed_as_in_the_plain_model():
    model = sfr.SFRWrapper(Body())
    with pytest.raises(AttributeError, match="'Body' object has no attribute 'no_such'"):
        _ = model.no_such
    assert not hasattr(model.unwrap(), "sfr")


def test_containers_are_indexed_counted_and_iterated(batch):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = train_step(nn.Sequential(*layers), batch)
    assert len(model) == 5
    assert model[0] is layers[0]
    assert list(model) == layers
    assert [type(layer) for layer in model[1:3]] == [nn.ReLU, nn.Conv2d]
    model.append(nn.ReLU())
    assert model(batch[0]).min() >= 0
    del model[5]
    assert len(model.unwrap()) == 5


class Listed(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x.mean((2, 3))


class Named(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x.mean((2, 3))


class Meta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.made_by = "Meta"
        return made


class OfMeta(Body, metaclass=Meta):
    pass


class Abstract(Body, abc.ABC):
    @abc.abstractmethod
    def name(self): ...


class Concrete(Abstract):
    def name(self):
        return "concrete"


class Slotted(Body):
    __slots__ = ("extra",)


class OwnCall(Body):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2


class Forwarding(nn.Module):
    """Gives what it does not have from the model inside."""

    def __init__(self):
        super().__init__()
        self.inner = Body()

    def forward(self, x):
        return self.inner(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class OwnState(Body):
    """Leaves a cache out of its copies."""

    def __init__(self):
        super().__init__()
        self.cache = {"big": 1}

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cache = {}


class OwnCopy(Body):
    """Copies itself by making another and loading its weights."""

    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(self.state_dict())
        return other


class SelfCalling(Body):
    """Predicts a batch of many images by halves, by calls of itself without gradient, before the forward of all."""

    def forward(self, x):
        if len(x) > 4:
            with torch.no_grad():
                self.hint = torch.cat([self(half) for half in x.chunk(2)])
        return super().forward(x)


class Callable_(nn.Module):
    """Has its forward as an attribute of the instance, as Accelerate sets it."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.forward = lambda x: self.body(x)


KINDS = {
    "ModuleList": lambda: Listed([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, 2)]),
    "ModuleDict": lambda: Named({"one": nn.Conv2d(3, 8, 3), "two": nn.Conv2d(8, 10, 3, 2)}),
    "metaclass": OfMeta,
    "abstract base": Concrete,
    "slots": Slotted,
    "__call__": OwnCall,
    "__getattr__": Forwarding,
    "__getstate__": OwnState,
    "__deepcopy__": OwnCopy,
    "GraphModule": lambda: fx.symbolic_trace(Body()),
    "parametrized part": lambda: with_norm(Body()),
    "parametrized root": lambda: Parametrized(),
}


def with_norm(net):
    weight_norm(net.first)
    return net


class Parametrized(Body):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 10))
        parametrizations.orthogonal(self)

    def forward(self, x):
        return super().forward(x) @ self.weight


@pytest.mark.parametrize("name", KINDS)
def test_odd_kinds_of_models_train_copy_and_come_back(batch, name):
    torch.manual_seed(0)
    net = KINDS[name]()
    kind, expected, keys = type(net), net(batch[0]), set(vars(net))
    model = train_step(net, batch)
    assert torch.equal(model(batch[0]), expected)
    twin = copy.deepcopy(model)
    criterion = sfr.SFRLoss(twin)
    assert torch.equal(twin(batch[0]), expected)
    criterion(twin(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    for each in (model, twin):
        assert sfr.unwrap(each) is each
        assert type(each) is kind or name in ("GraphModule", "parametrized root")  # which make a class for each
        assert not isinstance(each, sfr.SFRWrapper)
        assert not any(module._forward_hooks for module in each.modules())
        assert torch.equal(each(batch[0]), expected)
    assert set(vars(net)) == keys


def test_a_model_that_calls_itself_records_the_outer_forward(batch):
    model = sfr.SFRWrapper(SelfCalling())
    criterion = sfr.SFRLoss(model)
    for _ in range(3):
        criterion(model(batch[0]), batch[1]).backward()
        assert criterion.last.feature > 0
        assert criterion.last.feature.isfinite()


def test_a_forward_set_on_the_instance_is_recorded(batch):
    model = train_step(Callable_(), batch)
    assert model.sfr.stage_names == ("body.first", "body.second")


def test_a_direct_call_of_forward_is_an_error_that_says_so(batch):
    model = sfr.SFRWrapper(Body(), stages=["first", "second"])
    with pytest.raises(RuntimeError, match=r"called as model\(x\), not model\.forward\(x\)"):
        sfr.SFRLoss(model)(model.forward(batch[0]), batch[1])


def test_another_instance_of_the_class_is_plain(batch):
    model = sfr.SFRWrapper(Body())
    other = type(model)(width=4)
    assert type(other) is Body
    with pytest.raises(TypeError, match="needs an SFRWrapper"):
        sfr.SFRLoss(other)
    train_step(other, batch)


def test_a_slice_is_plain_and_pickles(batch):
    model = train_step(nn.Sequential(*layers()), batch)
    part = model[:3]
    assert type(part) is nn.Sequential
    whole = pickle.loads(pickle.dumps(nn.Sequential(part, nn.Flatten())))
    assert torch.equal(whole(batch[0]), part(batch[0]).flatten(1))


def test_a_model_can_initialise_itself_again():
    model = sfr.SFRWrapper(Body())
    model.__init__(width=4)
    assert model.first.out_channels == 4


def test_one_class_is_made_for_all_models_of_one():
    assert type(sfr.SFRWrapper(Body())) is type(sfr.SFRWrapper(Body()))


def test_a_class_that_admits_no_subclass_is_an_error_that_names_it():
    class Final(Body):
        def __init_subclass__(cls):
            raise RuntimeError("no subclasses")

    net = Final()
    with pytest.raises(TypeError, match=r"model's class .*Final cannot be wrapped.*RuntimeError: no subclasses"):
        sfr.SFRWrapper(net)
    assert type(net) is Final
    assert "_sfr" not in vars(net)


HOOKS = {
    "register_forward_pre_hook": lambda model, x: model(x),
    "register_forward_hook": lambda model, x: model(x),
    "register_full_backward_pre_hook": lambda model, x: model(x).sum().backward(),
    "register_full_backward_hook": lambda model, x: model(x.clone().requires_grad_()).sum().backward(),
    "register_state_dict_pre_hook": lambda model, x: model.state_dict(),
    "register_state_dict_post_hook": lambda model, x: model.state_dict(),
    "register_load_state_dict_pre_hook": lambda model, x: model.load_state_dict(model.state_dict()),
    "register_load_state_dict_post_hook": lambda model, x: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_every_kind_run(batch, register, when):
    called = []
    net = Body()
    if when == "after":
        net = sfr.SFRWrapper(net, stages=["first", "second"])
    getattr(net, register)(lambda *args, **kwargs: called.append(1))
    if when == "before":
        net = sfr.SFRWrapper(net, stages=["first", "second"])
    HOOKS[register](net, batch[0])
    assert called == [1]


@pytest.mark.parametrize("discovered", [True, False])
def test_a_wrapped_model_inside_another_trains(batch, discovered):
    options = {"example_input": batch[0]} if discovered else {}
    model = sfr.SFRWrapper(Body(), **options)
    whole = nn.Sequential(model, nn.ReLU(), nn.Linear(10, 10))
    criterion = sfr.SFRLoss(whole)
    criterion(whole(batch[0]), batch[1]).backward()
    assert criterion.model is model
    assert criterion.last.feature > 0


# What PyTorch makes of it


@pytest.mark.parametrize("first", ["wrap", "parametrize"])
@pytest.mark.parametrize("last", ["unwrap", "remove"])
def test_a_parametrization_of_the_root_comes_and_goes_in_any_order(batch, first, last):
    class Root(Body):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 10))

        def forward(self, x):
            return super().forward(x) @ self.weight

    net = Root()
    steps = [lambda: sfr.SFRWrapper(net), lambda: parametrizations.orthogonal(net)]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    model = train_step(sfr.unwrap(net), batch) if first == "parametrize" else net
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    torch.testing.assert_close(model.weight @ model.weight.T, torch.eye(10), atol=1e-5, rtol=0)
    undo = [lambda: sfr.unwrap(net), lambda: parametrize.remove_parametrizations(net, "weight")]
    for step in undo if last == "remove" else reversed(undo):
        step()
    assert type(net) is Root
    assert not parametrize.is_parametrized(net)
    net(batch[0])


def test_fx_traces_the_model(batch):
    model = sfr.SFRWrapper(Body(), example_input=batch[0]).eval()
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["first", "second", "head"]
    assert torch.equal(traced(batch[0]), model(batch[0]))
    inside = fx.symbolic_trace(nn.Sequential(model))
    assert "0.first" in [node.target for node in inside.graph.nodes]


def test_feature_extraction_knows_the_nodes_of_the_plain_model(batch, make_net):
    model = sfr.SFRWrapper(make_net(), example_input=batch[0])
    assert get_graph_node_names(model) == get_graph_node_names(make_net())
    extractor = create_feature_extractor(model.eval(), {"3": "deep"})
    expected = model[:4](batch[0])
    assert torch.equal(extractor(batch[0])["deep"], expected)


def test_export_names_inputs_as_the_plain_model_does(batch):
    model = sfr.SFRWrapper(Body(), example_input=batch[0]).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}, "labels": None, "bias": None}
    program = torch.export.export(model, (batch[0],), {"labels": None, "bias": 0.0}, dynamic_shapes=shapes)
    assert torch.allclose(program.module()(batch[0][:3], labels=None, bias=0.0), model(batch[0][:3]), atol=1e-6)


def test_onnx_names_inputs_as_the_plain_model_does(batch):
    model = sfr.SFRWrapper(Body(), example_input=batch[0]).eval()
    names = []
    for each in (model, model.unwrap()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own
            graph = torch.onnx.export(each, (batch[0],), dynamo=True, verbose=False).model.graph
        names.append([value.name for value in (*graph.inputs, *graph.initializers.values())])
    assert names[0] == names[1]
    assert {"pixel_values", "first.weight"} <= set(names[0])


def test_torchscript_takes_the_unwrapped_model_and_traces_the_wrapped_one(batch):
    model = train_step(Body(), batch).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(model, batch[0])
        scripted = torch.jit.script(sfr.unwrap(train_step(nn.Sequential(*layers()), batch)))
    assert torch.allclose(traced(batch[0]), model(batch[0]), atol=1e-6)
    assert scripted(batch[0]).shape == (8, 10)


def layers():
    return nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()


def test_compiling_in_place_breaks_no_graph(batch):
    torch._dynamo.reset()
    model = sfr.SFRWrapper(Body(), stages=["first", "second"])
    criterion = sfr.SFRLoss(model)
    model(batch[0])  # sees how the outputs are read
    model.compile(fullgraph=True, backend="eager")
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    assert model.eval()(batch[0]).shape == (8, 10)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "model", "base_model"])
def test_the_criterion_is_not_misled_by_attributes_of_the_models_own(batch, name):
    class Net(Body):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Identity())

    model = sfr.SFRWrapper(Net())
    assert sfr.SFRLoss(model).model is model
    assert sfr.SFRLoss(nn.Sequential(model)).model is model
    train_step(model, batch)


def test_the_criterion_asks_which_of_two_wrapped_models_is_meant():
    both = nn.ModuleDict({"student": sfr.SFRWrapper(Body()), "average": sfr.SFRWrapper(Body())})
    with pytest.raises(ValueError, match=r"several wrapped models, \['student', 'average'\]: pass one"):
        sfr.SFRLoss(both)


def test_a_wrapped_model_that_holds_another_is_the_one_that_is_meant(batch):
    body = Body()
    outer = sfr.SFRWrapper(nn.Sequential(body, nn.ReLU(), nn.Linear(10, 10)), stages=["0.first", "0.second"])
    sfr.SFRWrapper(body)
    assert sfr.SFRLoss(outer).model is outer
    assert sfr.SFRLoss(body).model is body


def test_pickles_of_the_wrapped_model_name_its_plain_class(batch):
    model = train_step(Body(), batch)
    assert type(pickle.loads(pickle.dumps(model)).unwrap()) is Body
    assert type(pickle.loads(pickle.dumps(model.unwrap()))) is Body
