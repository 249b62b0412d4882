"""The criterion's state is tensors: whatever saves tensors saves it, and a fresh criterion takes it up."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import sfr
from sfr.labels import DynamicLabelSmoothing

CLASSES = 10
MODES: dict[str, dict[str, Any]] = {
    "running": {"smoothing": "class_mean", "feature_weight": sfr.Ramp(0, 0.25, steps=6)},
    "epoch": {"smoothing": "class_mean", "update": "epoch"},
    "past": {"smoothing": "past", "num_samples": 8},
    "uniform": {"smoothing": "uniform", "alpha": 0.3},
    "none": {"smoothing": "none"},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


@pytest.fixture
def new_run(make_net):
    def build(switches):
        torch.manual_seed(1)
        model = sfr.SFRWrapper(make_net(CLASSES))
        return model, sfr.SFRLoss(model, **switches)

    return build


def train(run, steps: range, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Losses of these steps, without an optimizer: the model stays, the criterion moves."""
    model, criterion = run
    losses = []
    for step in steps:
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        target = model(images).detach().argmax(dim=1).where(torch.arange(8) < 5, 3)
        losses.append(criterion(model(images), target, index=torch.arange(8)).detach())
        if criterion.config.update == "epoch" and step % 2:
            criterion.end_epoch()
    return losses


def through_a_file(state, folder):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return lambda criterion: criterion.load_state_dict(torch.load(file, weights_only=True))


def through_safetensors(state, folder):
    save_file(state, folder / "state.safetensors")
    return lambda criterion: criterion.load_state_dict(load_file(folder / "state.safetensors"))


def through_a_distributed_checkpoint(state, folder):
    dcp.save({"criterion": state}, checkpoint_id=folder / "checkpoint")

    def load(criterion):
        restored = {"criterion": criterion.state_dict()}
        dcp.load(restored, checkpoint_id=folder / "checkpoint")
        criterion.load_state_dict(restored["criterion"])

    return load


WAYS = [through_a_file, through_safetensors, through_a_distributed_checkpoint]
# Of torch alone: it warns of one process, and torch 2.6 of its own use of TypedStorage.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


@every_mode
@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_criterion_continues_from_a_saved_state(new_run, tmp_path, way, options):
    straight, resumed = new_run(options), new_run(options)
    train(straight, range(3))
    load = way(straight[1].state_dict(), tmp_path)
    load(resumed[1])
    assert train(resumed, range(3, 8)) == train(straight, range(3, 8))
    assert resumed[1].step == 8


@every_mode
@pytest.mark.parametrize("way", WAYS)
def test_a_state_from_before_the_first_step_loads(new_run, tmp_path, way, options):
    fresh, used = new_run(options), new_run(options)
    train(used, range(3))
    way(fresh[1].state_dict(), tmp_path)(used[1])
    assert train(used, range(3)) == train(fresh, range(3))


@every_mode
def test_the_state_holds_tensors_alone_and_none_is_empty(new_run, options):
    _, criterion = run = new_run(options)
    for _ in range(2):
        state = criterion.state_dict()
        assert all(type(value) is Tensor and value.numel() for value in state.values()), state
        train(run, range(2))


def test_the_state_has_these_names(new_run):
    names = {mode: sorted(new_run(options)[1].state_dict()) for mode, options in MODES.items()}
    assert names["none"] == names["uniform"] == ["labels.step", "step"]
    assert names["running"] == ["labels.counts", "labels.distributions", "labels.step", "step"]
    assert names["epoch"] == [*names["running"][:2], "labels.step", "labels.sums", "step"]
    assert names["past"] == ["labels.past.table", "labels.step", "step"]


def test_pytorchs_own_functions_on_state_dicts_take_the_criterion(new_run):
    straight, resumed = new_run(MODES["running"]), new_run(MODES["running"])
    train(straight, range(3))
    set_model_state_dict(resumed[1], get_model_state_dict(straight[1]))
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


@pytest.mark.parametrize("options", [MODES["running"], MODES["past"]], ids=["running", "past"])
def test_accelerate_saves_and_loads_a_prepared_criterion(new_run, tmp_path, options):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    straight, resumed = new_run(options), new_run(options)
    prepared = accelerator.prepare(*straight)
    train(prepared, range(3))
    accelerator.save_state(tmp_path)
    accelerator = Accelerator(cpu=True)
    again = accelerator.prepare(*resumed)
    accelerator.load_state(tmp_path)
    assert train(again, range(3, 6)) == train(prepared, range(3, 6))
    accelerator.free_memory()


@pytest.mark.parametrize("mode", ["class_mean", "past"])
def test_where_the_classes_are_not_known_a_distributed_checkpoint_asks_for_their_number(tmp_path, mode):
    options = {"mode": mode, "num_samples": 8 if mode == "past" else None}
    straight = DynamicLabelSmoothing(**options)
    batch = torch.eye(CLASSES)[:8], torch.arange(8), torch.arange(8)
    straight(*batch)
    load = through_a_distributed_checkpoint(straight.state_dict(), tmp_path)
    with pytest.raises(
        RuntimeError, match=r"holds no label statistics, which a run of 1 steps has.*state num_classes="
    ):
        load(DynamicLabelSmoothing(**options))
    resumed = DynamicLabelSmoothing(**options, num_classes=CLASSES)
    load(resumed)
    assert resumed(*batch) == straight(*batch)


def test_the_number_of_classes_that_is_stated_is_checked(new_run, batch):
    with pytest.raises(ValueError, match="num_classes must"):
        DynamicLabelSmoothing(num_classes=0)
    model, _ = new_run(MODES["running"])
    with pytest.raises(ValueError, match="num_classes=7, and the logits have 10"):
        sfr.SFRLoss(model, num_classes=7, **MODES["running"])(model(batch[0]), batch[1])


def test_a_last_layer_that_is_not_of_the_classes_harms_nothing(batch):
    head = nn.Linear(16, 4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Sequential(nn.Linear(16, 10))).append(nn.Identity())
    net[-2].forward = lambda x, inner=net[-2][0]: inner(x)
    net[-2].append(head)  # registered last, and unused
    model = sfr.SFRWrapper(net, stages=["0", "2"])
    criterion = sfr.SFRLoss(model, smoothing="class_mean")
    criterion.load_state_dict(criterion.state_dict())
    criterion(model(batch[0]), batch[1])
    other = sfr.SFRLoss(model, smoothing="class_mean")
    other.load_state_dict(criterion.state_dict())
    assert len(other.labels.distributions) == 10


def test_a_state_of_before_it_was_tensors_loads(new_run):
    straight, resumed = new_run(MODES["running"]), new_run(MODES["running"])
    train(straight, range(3))
    labels = straight[1].labels
    statistics = {name: getattr(labels, name).clone() for name in ("distributions", "sums", "counts")}
    old = {"_extra_state": {"step": 3}, "labels._extra_state": {"step": 3, **statistics}}
    resumed[1].load_state_dict(old)
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


def test_past_predictions_of_before_the_state_was_tensors_load(new_run):
    straight, resumed = new_run(MODES["past"]), new_run(MODES["past"])
    train(straight, range(3))
    empty = {name: torch.empty(0) for name in ("distributions", "sums", "counts")}
    table = straight[1].labels.past.table.clone()
    old = {"_extra_state": {"step": 3}, "labels._extra_state": {"step": 3, **empty}, "labels.past._extra_state": table}
    resumed[1].load_state_dict(old)
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


class Task(nn.Module):
    """A module that holds a model and, if it is given, a criterion, as a LightningModule does."""

    def __init__(self, model, criterion=None):
        super().__init__()
        self.model, self.criterion = model, criterion


@every_mode
def test_a_checkpoint_of_a_run_without_the_criterion_loads_and_leaves_it_at_its_start(new_run, options):
    model, criterion = new_run(options)
    state = {name: value + 1 for name, value in Task(model.unwrap()).state_dict().items()}
    model, criterion = new_run(options)
    Task(model, criterion).load_state_dict(state)
    assert torch.equal(model.state_dict()["0.weight"], state["model.0.weight"])
    assert criterion.step == criterion.labels.step == 0


def test_a_state_in_which_something_is_missing_or_too_much_is_refused(new_run):
    run = new_run(MODES["running"])
    train(run, range(2))
    state = run[1].state_dict()
    for name in ("step", "labels.step", "labels.counts", "labels.distributions"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=r"Missing key|no label statistics"):
            run[1].load_state_dict(rest)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        run[1].load_state_dict({**state, "labels.other": torch.zeros(1)})


@every_mode
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_change_of_precision_takes_the_statistics_along(new_run, options, before, after):
    model, criterion = run = new_run(options)
    model.to(before)
    train(run, range(3), before)
    model.to(after)
    losses = train(run, range(3, 6), after)
    expected = new_run(options)
    train(expected, range(3))
    torch.testing.assert_close([loss.float() for loss in losses], train(expected, range(3, 6)), rtol=1e-4, atol=1e-5)
    assert criterion.labels.distributions.dtype == (after if criterion.labels.mode == "class_mean" else torch.float32)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_of_another_precision_loads(new_run, options, dtype):
    straight, resumed = new_run(options), new_run(options)
    train(straight, range(3))
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in straight[1].state_dict().items()
    }
    resumed[1].load_state_dict(state)
    torch.testing.assert_close(train(resumed, range(3, 6)), train(straight, range(3, 6)), rtol=0.01, atol=0.01)


@every_mode
def test_a_state_that_goes_through_inference_mode_trains_on(new_run, options):
    straight, resumed = new_run(options), new_run(options)
    train(straight, range(3))
    with torch.inference_mode():
        resumed[1].load_state_dict(copy.deepcopy(straight[1].state_dict()))
        if resumed[1].config.update == "epoch":
            straight[1].end_epoch()
            resumed[1].end_epoch()
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


@pytest.mark.parametrize("update", ["running", "epoch"])
def test_statistics_begun_in_inference_mode_go_on_outside(update):
    criterion, expected = DynamicLabelSmoothing(update=update), DynamicLabelSmoothing(update=update)
    logits, target = torch.eye(CLASSES), torch.arange(CLASSES)
    with torch.inference_mode():
        criterion(logits, target)
    expected(logits, target)
    assert criterion(logits, target) == expected(logits, target)


def test_a_wrapped_model_that_was_pickled_before_there_were_branches_trains_on(make_net, batch):
    model = sfr.SFRWrapper(make_net())
    criterion = sfr.SFRLoss(model)
    criterion(model(batch[0]), batch[1]).backward()
    for owner, names in ((model._sfr, ("apart", "returned")), (model._sfr.recorder, ("output_shape",))):
        for name in names:
            vars(owner).pop(name, None)
    model, criterion = pickle.loads(pickle.dumps((model, criterion)))
    criterion(model(batch[0]), batch[1]).backward()
    assert criterion.last.feature > 0
    assert criterion.report(batch[0], repeats=1).pairs


@every_mode
@pytest.mark.parametrize("step", [-5, 2.5, float("nan"), [3, 4]])
def test_a_step_that_is_no_count_is_refused(new_run, options, step):
    model, criterion = new_run(options)
    train((model, criterion), range(2))
    state = criterion.state_dict() | {"step": torch.tensor(step)}
    with pytest.raises(ValueError, match="damaged: 'step' must be one whole number"):
        criterion.load_state_dict(state)


def test_a_step_may_be_a_number_of_python(new_run):
    _, criterion = new_run({})
    criterion.load_state_dict(criterion.state_dict() | {"step": 7})
    assert criterion.step == 7


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.5, 3.0])
def test_a_damaged_table_of_past_predictions_is_refused(new_run, value):
    run = new_run(MODES["past"])
    train(run, range(2))
    state = run[1].state_dict()
    state["labels.past.table"][3, 2] = value
    with pytest.raises(ValueError, match="damaged: 'table'"):
        run[1].load_state_dict(state)


@pytest.mark.parametrize("name", ["distributions", "counts", "sums"])
def test_statistics_of_the_wrong_number_of_axes_are_refused(new_run, name):
    run = new_run(MODES["epoch"])
    train(run, range(3))
    state = run[1].state_dict()
    state[f"labels.{name}"] = state[f"labels.{name}"].flatten()[:, None, None]
    with pytest.raises(ValueError, match=f"damaged: '{name}'"):
        run[1].load_state_dict(state)


@pytest.mark.parametrize(("before", "after"), [("running", "epoch"), ("epoch", "running")])
def test_class_means_go_on_with_the_other_update(new_run, before, after):
    own = {name: options | {"feature_weight": 0.25} for name, options in MODES.items()}
    run, other = new_run(own[before]), new_run(own[after])
    train(run, range(4))
    state = run[1].state_dict()
    other[1].load_state_dict(state)
    assert torch.equal(other[1].labels.distributions, state["labels.distributions"])
    train(other, range(4, 8))
    assert not torch.equal(other[1].labels.distributions, state["labels.distributions"])
    assert len(other[1].labels.sums) == (CLASSES if after == "epoch" else 0)


@pytest.mark.parametrize("other", ["none", "uniform", "past"])
def test_class_means_are_not_dropped_in_silence_by_another_kind_of_smoothing(new_run, other):
    run, fresh = new_run(MODES["running"]), new_run(MODES[other])
    train(run, range(2))
    with pytest.raises(RuntimeError, match=r"labels\.distributions"):
        fresh[1].load_state_dict(run[1].state_dict())
    if other != "past":  # which cannot go on without its own
        fresh[1].load_state_dict(run[1].state_dict(), strict=False)
        assert fresh[1].step == run[1].step
