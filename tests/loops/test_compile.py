"""torch.compile never loses the feature term, and compiles nothing anew after the first steps."""

import copy

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import sfr

STAGES = r"(_orig_mod\.)?(stem|body|last)"

# Dynamo looks at .grad of what it is given and hides this warning, which it cannot where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.last(self.body(self.stem(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def feature(net, batch):
    """The feature term of the eager model."""
    model = sfr.SFRWrapper(copy.deepcopy(net), stages=STAGES)
    (feature,) = train(model, sfr.SFRLoss(model), batch, steps=1)
    assert feature > 0
    return feature


def compiled(module, fullgraph=False):
    return torch.compile(module, backend="eager", fullgraph=fullgraph)


def train(model, criterion, batch, steps):
    """Return the feature term of each step, the same for all: there is no optimizer."""
    features = []
    for _ in range(steps):
        criterion(model(batch[0]), batch[1]).backward()
        features.append(getattr(criterion, "_orig_mod", criterion).last.feature)
    return torch.stack(features)


def train_and_count(model, criterion, batch):
    """Return the feature term of five steps and the number of graphs; compiling anew after the second is an error."""
    features = train(model, criterion, batch, steps=2)
    torch.compiler.set_stance("fail_on_recompile")
    features = torch.cat([features, train(model, criterion, batch, steps=3)])
    return features, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("fullgraph", [False, True], ids=["default", "fullgraph"])
@pytest.mark.parametrize(
    "way", ["wrapped, then compiled", "compiled, then wrapped", "in place", "in place, then wrapped"]
)
def test_named_stages_need_one_graph(net, batch, feature, way, fullgraph):
    if way == "wrapped, then compiled":
        model = compiled(sfr.SFRWrapper(net, stages=STAGES), fullgraph)
    elif way == "compiled, then wrapped":
        model = sfr.SFRWrapper(compiled(net, fullgraph), stages=STAGES)
    elif way == "in place":
        model = sfr.SFRWrapper(net, stages=STAGES)
        model.compile(backend="eager", fullgraph=fullgraph)
    else:
        net.compile(backend="eager", fullgraph=fullgraph)
        model = sfr.SFRWrapper(net, stages=STAGES)
    features, graphs = train_and_count(model, sfr.SFRLoss(model), batch)
    torch.testing.assert_close(features, feature.expand(5))
    assert graphs == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("way", ["wrapped, then compiled", "compiled, then wrapped", "parts compiled, then wrapped"])
def test_stages_are_discovered_with_no_argument(net, batch, feature, way):
    if way == "wrapped, then compiled":
        wrapped = sfr.SFRWrapper(net)
        model = compiled(wrapped)
    elif way == "compiled, then wrapped":
        model = wrapped = sfr.SFRWrapper(compiled(net))
    else:
        net.body.compile(backend="eager")
        net.last = compiled(net.last)
        model = wrapped = sfr.SFRWrapper(net)
    features, graphs = train_and_count(model, sfr.SFRLoss(model), batch)
    torch.testing.assert_close(features, feature.expand(5))
    if way == "wrapped, then compiled":
        assert graphs == 1  # nothing is compiled while the stages are discovered
    assert [name.removeprefix("_orig_mod.").split(".")[0] for name in wrapped.sfr.stage_names] == [
        "stem",
        "body",
        "last",
    ]


def test_discovery_in_one_graph_is_an_error_that_names_the_arguments(net, batch):
    model = compiled(sfr.SFRWrapper(net), fullgraph=True)
    with pytest.raises(Exception, match=r"with fullgraph=True pass example_input= or stages="):
        model(batch[0])
    model = compiled(sfr.SFRWrapper(net, example_input=batch[0]), fullgraph=True)
    assert train(model, sfr.SFRLoss(model), batch, steps=1) > 0


def test_stages_of_a_model_that_has_run_compiled_are_an_error_that_says_what_to_do(net, batch, feature):
    net = compiled(net)
    for _ in range(2):
        net(batch[0])
    model = sfr.SFRWrapper(net, stages=STAGES)
    model(batch[0])  # is watched, and runs eagerly
    with pytest.raises(RuntimeError, match=r"compiled before it was wrapped and.* run.*torch\.compiler\.reset\(\)"):
        model(batch[0])
    torch.compiler.reset()
    torch.testing.assert_close(train(model, sfr.SFRLoss(model), batch, steps=1)[0], feature)


def test_a_compiled_control_of_the_same_class_beside_it_asks_for_wrapping_first(net, batch, feature):
    control, compiled_first = (compiled(copy.deepcopy(net)) for _ in range(2))
    control(batch[0])
    model = sfr.SFRWrapper(compiled_first, stages=STAGES)
    model(batch[0])
    with pytest.raises(RuntimeError, match=r"another of its class, had run.*wrap first and compile then"):
        model(batch[0])
    model = sfr.SFRWrapper(net, stages=STAGES)
    criterion, model = sfr.SFRLoss(model), compiled(model)
    for _ in range(2):
        torch.testing.assert_close(train(model, criterion, batch, steps=2), torch.stack([feature, feature]))
        torch.testing.assert_close(control(batch[0]), model(batch[0]))


@pytest.mark.parametrize("model_too", [False, True], ids=["criterion", "model and criterion"])
def test_a_compiled_criterion_runs_eagerly_and_never_compiles_anew(net, batch, feature, model_too):
    model = sfr.SFRWrapper(net, stages=STAGES)
    criterion = compiled(sfr.SFRLoss(model))
    features, graphs = train_and_count(compiled(model) if model_too else model, criterion, batch)
    torch.testing.assert_close(features, feature.expand(5))
    assert graphs == model_too


def test_a_compiled_step_breaks_at_the_criterion_and_never_compiles_anew(net, batch, feature):
    model = sfr.SFRWrapper(net, stages=STAGES)
    criterion = sfr.SFRLoss(model)
    step = torch.compile(lambda images, labels: criterion(model(images), labels), backend="eager")
    for _ in range(2):
        step(*batch)
    torch.compiler.set_stance("fail_on_recompile")
    step(*batch).backward()
    torch.testing.assert_close(criterion.last.feature, feature)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_criterion_in_one_graph_is_an_error_that_says_why(net, batch):
    model = sfr.SFRWrapper(net, stages=STAGES)
    criterion = compiled(sfr.SFRLoss(model), fullgraph=True)
    with pytest.raises(Exception, match="runs eagerly by design: not with fullgraph=True"):
        criterion(model(batch[0]), batch[1])


def test_evaluation_disable_and_another_batch_size_come_and_go(net, batch, feature):
    wrapped = sfr.SFRWrapper(net, stages=STAGES)
    model, criterion = compiled(wrapped), sfr.SFRLoss(wrapped)
    for _ in range(2):
        torch.testing.assert_close(train(model, criterion, batch, steps=1)[0], feature)
        model(batch[0])
        wrapped.eval()
        model(batch[0])
        assert not wrapped._sfr.recorder.features
        wrapped.train()
        with wrapped.disable():
            assert torch.equal(model(batch[0]), net(batch[0]))
            assert not wrapped._sfr.recorder.features
        with torch.no_grad():
            model(batch[0])
        assert not wrapped._sfr.recorder.features
        assert train(model, criterion, (batch[0][:5], batch[1][:5]), steps=1) > 0


def test_features_are_those_after_an_operation_in_place(net, batch, feature):
    """As without compilation: the ReLU that follows body.0 writes into its output."""
    model = sfr.SFRWrapper(net, stages=["stem", "body.0", "last"])
    torch.testing.assert_close(train(compiled(model), sfr.SFRLoss(model), batch, steps=1)[0], feature)


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("way", ["DDP, then compiled", "compiled, then DDP"])
@pytest.mark.parametrize("stages", [STAGES, None], ids=["named", "discovered"])
def test_with_ddp_the_feature_term_stays(net, batch, feature, way, stages):
    model = sfr.SFRWrapper(net, stages=stages)
    if way == "DDP, then compiled":
        parallel = compiled(DistributedDataParallel(model))
    else:
        parallel = DistributedDataParallel(compiled(model))
    features, _ = train_and_count(parallel, sfr.SFRLoss(parallel), batch)
    torch.testing.assert_close(features, feature.expand(5))


def replaying(graph, _):
    """Compile to a function that gives the very tensors of its first call in every later one, as CUDA graphs do."""
    kept = []

    def run(*args):
        found = graph(*args)
        kept.extend(each.clone() if isinstance(each, torch.Tensor) else each for each in (() if kept else found))
        for old, new in zip(kept, found, strict=True):
            if isinstance(new, torch.Tensor):
                old.copy_(new)
        return tuple(kept)

    return make_boxed_func(run)


@pytest.mark.parametrize("parts", [False, True], ids=["the model", "its parts"])
def test_replayed_outputs_which_are_the_same_tensors_in_every_step_belong_to_their_own(net, batch, parts):
    images, labels = batch
    found = []
    for replay in (False, True):
        model = sfr.SFRWrapper(copy.deepcopy(net), stages=STAGES)
        backend = aot_autograd(fw_compiler=replaying)
        for each in (model.stem, model.body, model.last) if replay and parts else ():
            each.compile(backend=backend)
        forward = torch.compile(model, backend=backend) if replay and not parts else model
        criterion = sfr.SFRLoss(model, feature_weight=1.0)
        outputs = []
        for step in range(7):
            model.zero_grad()
            for _ in range(step if step in (2, 4) else 0):
                forward(images)  # whose features nobody uses
            output = forward(images * (1 + step))
            criterion(output, labels).backward()
            outputs.append(id(output))
            found.append([each.grad for each in model.parameters()])
        assert outputs[-1] == outputs[-2] or parts or not replay
    for eager, replayed in zip(found[:7], found[7:], strict=True):
        torch.testing.assert_close(replayed, eager)
