"""What goes with the next release still works, says what takes its place, and gives the very same losses."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import sfr
from sfr.labels import DynamicLabelSmoothing

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
SWITCHES = [field.name for field in fields(sfr.SFRConfig)]
OF_THE_WRAPPER = {"stages": None, "layout": "auto", "prefix_tokens": "auto"}

# Switches by their old names or in their old place, and what is written instead.
OLD_AND_NEW = {
    "weight": ({"weight": 0.7}, {"feature_weight": 0.7}),
    "weight that is a ramp": (
        {"weight": sfr.Ramp(0.5, 0, steps=3)},
        {"feature_weight": sfr.Ramp(0.5, 0, steps=3)},
    ),
    "warmup": ({"warmup": 4}, {"feature_weight": sfr.Ramp(0, 0.25, steps=4)}),
    "weight and warmup": ({"weight": 0.7, "warmup": 4}, {"feature_weight": sfr.Ramp(0, 0.7, steps=4)}),
    "no warmup": ({"weight": 0.7, "warmup": 0}, {"feature_weight": 0.7}),
    "alpha_end": (
        {"smoothing": "class_mean", "alpha_end": 0.9, "alpha_steps": 4},
        {"smoothing": "class_mean", "alpha": sfr.Ramp(0.5, 0.9, steps=4)},
    ),
    "alpha and alpha_end": (
        {"smoothing": "uniform", "alpha": 0.4, "alpha_end": 0.0, "alpha_steps": 4},
        {"smoothing": "uniform", "alpha": sfr.Ramp(0.4, 0.0, steps=4)},
    ),
    "alpha_end of past": (
        {"smoothing": "past", "num_samples": 8, "alpha": 0.0, "alpha_end": 0.8, "alpha_steps": 4},
        {"smoothing": "past", "num_samples": 8, "alpha": sfr.Ramp(0.0, 0.8, steps=4)},
    ),
}
# What kept its name and moved from the wrapper to the criterion.
MOVED = {
    "pairs": {"pairs": "last"},
    "how the pairs are compared": {"max_grid": 2, "grouping": "crop", "cost": "correlation", "marginals": "cross"},
    "detach_deep": {"detach_deep": False},
    "solver": {"solver": "sinkhorn"},
    "smoothing": {"smoothing": "class_mean", "alpha": 0.3, "momentum": 0.1},
    "update": {"smoothing": "class_mean", "update": "epoch"},
    "past": {"smoothing": "past", "num_samples": 8},
    "ignore_index": {"ignore_index": 3},
}
renamed = pytest.mark.parametrize(("old", "new"), OLD_AND_NEW.values(), ids=OLD_AND_NEW)
renamed_or_moved = pytest.mark.parametrize(
    ("old", "new"),
    [*OLD_AND_NEW.values(), *((values, values) for values in MOVED.values())],
    ids=[*OLD_AND_NEW, *MOVED],
)


class Deprecated:
    """Collects what is warned of in a ``with`` block, all of it."""

    def __enter__(self) -> "Deprecated":
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: object) -> None:
        self._catching.__exit__(*error)

    @property
    def message(self) -> str:
        """The one deprecation, which points to this file."""
        [warning] = self._caught
        assert warning.category is DeprecationWarning
        assert warning.filename == __file__
        assert Path(__file__).read_text().splitlines()[warning.lineno - 1].endswith("# the caller's line")
        return str(warning.message)


def losses(criterion, steps=6):
    """Losses of steps with gradients in between, as a training gives them."""
    model, values = criterion.model, []
    for step in range(steps):
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        loss = criterion(model(images), torch.arange(8), index=torch.arange(8))
        values.append(loss.detach())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        if step % 3 == 2:
            criterion.end_epoch()
    return torch.stack(values)


@pytest.fixture
def net_of(make_net):
    """Return a builder of nets with the same parameters."""

    def build():
        torch.manual_seed(1)
        return make_net()

    return build


@pytest.fixture
def expected(net_of):
    """Return a function that gives the losses of a criterion with these switches."""

    def of(switches, **settings):
        found = losses(
            sfr.SFRLoss(sfr.SFRWrapper(net_of(), **settings), **{"gate": "none", **switches})
        )  # no old one had
        assert found.isfinite().all()
        return found

    return of


def names_what_replaces(message, old):
    """Whether a message says of each old argument what is written instead."""
    instead = {
        "weight": "feature_weight",
        "warmup": "feature_weight=Ramp(0, weight, warmup)",
        "alpha_end": "alpha=Ramp(alpha, alpha_end, alpha_steps)",
        "alpha_steps": "alpha=Ramp(alpha, alpha_end, alpha_steps)",
    }
    return all(f"{name}= becomes {instead[name]}" in message for name in old if name in instead)


# The wrapper, which once took the switches of the criterion.


@renamed_or_moved
def test_keywords_of_the_wrapper_become_those_of_the_criterion(net_of, expected, old, new):
    with Deprecated() as deprecated:
        model = sfr.SFRWrapper(net_of(), **old)  # the caller's line
    for name in old:
        replacement = {"weight": "feature_weight", "warmup": "feature_weight=Ramp("}.get(name, "alpha=Ramp(")
        replacement = replacement if name not in SWITCHES else f"{name}="
        assert f"{name}= becomes SFRLoss(model, {replacement}" in deprecated.message
    assert "SFRWrapper: these arguments go with the next release" in deprecated.message
    criterion = sfr.SFRLoss(model)
    assert criterion.config == model.sfr.config == sfr.SFRConfig(gate="none", **new)
    assert torch.equal(losses(criterion), expected(new))


@renamed_or_moved
def test_a_mapping_given_to_the_wrapper_becomes_switches_of_the_criterion(net_of, expected, old, new):
    with Deprecated() as deprecated:
        model = sfr.SFRWrapper(net_of(), old)  # the caller's line
    assert all(f"{name}= becomes SFRLoss(model, " in deprecated.message for name in old)
    assert torch.equal(losses(sfr.SFRLoss(model)), expected(new))


@renamed_or_moved
def test_a_config_given_to_the_wrapper_becomes_that_of_the_criterion(net_of, expected, old, new):
    config = sfr.SFRConfig(gate="none", **new)
    with Deprecated() as deprecated:
        model = sfr.SFRWrapper(net_of(), config)  # the caller's line
    assert all(f"{name}= becomes SFRLoss(model, {name}=" in deprecated.message for name in new)
    assert sfr.SFRLoss(model).config == config
    assert torch.equal(losses(sfr.SFRLoss(model)), expected(new))


def test_a_config_given_by_name_and_keywords_beside_it_count_as_before(net_of, expected):
    for config in (sfr.SFRConfig(feature_weight=0.7, gate="none", pairs="last"), {"weight": 0.7, "pairs": "last"}):
        with Deprecated() as deprecated:
            model = sfr.SFRWrapper(net_of(), config=config, pairs="adjacent")  # the caller's line
        assert "pairs= becomes SFRLoss(model, pairs=)" in deprecated.message
        assert torch.equal(losses(sfr.SFRLoss(model)), expected({"feature_weight": 0.7, "pairs": "adjacent"}))


def test_what_is_the_wrapper_s_own_in_a_mapping_stays_with_it(net_of, expected):
    own = {"stages": ["1", "3"], "layout": "channels_first", "prefix_tokens": 0}
    with Deprecated() as deprecated:
        model = sfr.SFRWrapper(net_of(), {**own, "weight": 0.7})  # the caller's line
    assert not any(f"{name}=" in deprecated.message for name in own)
    assert model.sfr.stage_names == ("1", "3")
    assert torch.equal(losses(sfr.SFRLoss(model)), expected({"feature_weight": 0.7}, **own))


def test_switches_of_the_criterion_replace_those_that_the_wrapper_was_given(net_of, expected):
    with Deprecated():
        model = sfr.SFRWrapper(net_of(), weight=0.7, pairs="last")
    assert sfr.SFRLoss(model, feature_weight=0.1).config == sfr.SFRConfig(feature_weight=0.1, gate="none", pairs="last")
    assert sfr.SFRLoss(model, sfr.SFRConfig()).config == sfr.SFRConfig()
    assert torch.equal(losses(sfr.SFRLoss(model, pairs="all")), expected({"feature_weight": 0.7}))


def test_the_report_of_the_model_is_of_the_switches_that_the_wrapper_was_given(net_of):
    with Deprecated():
        model = sfr.SFRWrapper(net_of(), pairs="last")
    report = model.report(torch.randn(4, 3, 16, 16), repeats=1)
    assert [(row.shallow, row.deep) for row in report.pairs] == [("1", "5"), ("3", "5")]


def test_what_the_wrapper_takes_by_itself_is_no_deprecation(net_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = torch.zeros(1, 3, 16, 16)
        own = {"stages": ["1", "3"], "layout": "channels_first", "prefix_tokens": 0}
        sfr.SFRWrapper(net_of(), **own, example_input=example, record_in_eval=True)
        sfr.SFRWrapper(net_of(), None)
        sfr.SFRWrapper(net_of(), {})


def test_a_bad_value_of_the_criterion_given_to_the_wrapper_is_refused_at_once(net_of):
    net = net_of()
    for old, message in (
        ({"max_grid": 0}, "max_grid must"),
        ({"weight": -1}, "feature_weight must"),
        ({"warmup": 1.5}, ""),
    ):
        with Deprecated(), pytest.raises((TypeError, ValueError), match=message):
            sfr.SFRWrapper(net, **old)
        with Deprecated(), pytest.raises((TypeError, ValueError), match=message):
            sfr.SFRWrapper(net, old)
    assert type(net) is nn.Sequential


def test_an_unknown_key_of_a_mapping_is_refused_with_the_near_name(net_of):
    with Deprecated(), pytest.raises(ValueError, match=r"SFRConfig has no field \['max_gird'\]; .*'max_grid'"):
        sfr.SFRWrapper(net_of(), {"max_gird": 4})


# SFRConfig, which once had other names.


@renamed
def test_old_names_of_the_config_become_the_new_ones(net_of, expected, old, new):
    with Deprecated() as deprecated:
        config = sfr.SFRConfig(**old)  # the caller's line
    assert "SFRConfig: these arguments go with the next release" in deprecated.message
    assert names_what_replaces(deprecated.message, old)
    assert not any(f"{name}= becomes" in deprecated.message for name in new if name not in old)
    assert config == sfr.SFRConfig(gate="none", **new)
    assert torch.equal(losses(sfr.SFRLoss(sfr.SFRWrapper(net_of()), config)), expected(new))


@renamed
def test_old_names_in_a_dict_of_a_file_are_read_without_a_warning(old, new):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sfr.SFRConfig.from_dict(old) == sfr.SFRConfig(gate="none", **new)
        assert sfr.SFRConfig.from_dict({**old, **OF_THE_WRAPPER}) == sfr.SFRConfig(gate="none", **new)


BAD = [
    ("weight", -0.1, ValueError),
    ("weight", float("nan"), ValueError),
    ("weight", float("inf"), ValueError),
    ("weight", "0.1", TypeError),
    ("weight", True, TypeError),
    ("weight", None, TypeError),
    ("warmup", -1, ValueError),
    ("warmup", 1.5, TypeError),
    ("warmup", True, TypeError),
    ("alpha_end", -1, ValueError),
    ("alpha_end", 2, ValueError),
    ("alpha_end", True, TypeError),
    ("alpha_steps", 0, ValueError),
    ("alpha_steps", 10.0, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_a_bad_value_under_an_old_name_is_refused_with_name_and_value(name, value, error):
    def with_a_warning(**old):
        with Deprecated():
            return sfr.SFRConfig(**old)

    for build in (with_a_warning, lambda **old: sfr.SFRConfig.from_dict(old)):
        with pytest.raises(error, match=rf"{name} must ") as caught:
            build(smoothing="class_mean", **{name: value})
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            {"smoothing": "class_mean", "alpha_end": 0.8},
            r"alpha_end=0.8 needs alpha_steps, .* at least 2.*len\(loader\)",
        ),
        (
            {"smoothing": "class_mean", "alpha": 0.0, "alpha_end": 0.8},
            r"alpha_end=0.8 needs alpha_steps, .* at least 2.*len\(loader\)",
        ),
        (
            {"smoothing": "uniform", "alpha": 0.5, "alpha_steps": 5},
            r"^without effect, leave out: alpha_steps \(of alpha_end",
        ),
        (
            {"smoothing": "none", "alpha_end": 0.9, "alpha_steps": 5},
            r"^without effect.*leave out: alpha.*\(of smoothing=",
        ),
        ({"weight": sfr.Ramp(0, 1, 10), "warmup": 5}, r"warmup has no effect beside weight=Ramp"),
        (
            {"smoothing": "uniform", "alpha": sfr.Ramp(0, 1, 10), "alpha_end": 0.5, "alpha_steps": 4},
            r"alpha_end has no effect beside alpha=Ramp",
        ),
    ],
)
def test_old_names_without_effect_are_refused_with_what_they_belong_to(net_of, old, message):
    for build in (lambda: sfr.SFRConfig(**old), lambda: sfr.SFRWrapper(net_of(), **old)):
        with Deprecated(), pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match=message):
        sfr.SFRConfig.from_dict(old)


@pytest.mark.parametrize(("name", "value"), [("stages", ["1", "3"]), ("layout", "tokens"), ("prefix_tokens", 1)])
def test_what_is_the_wrapper_s_is_refused_by_the_config_with_where_it_belongs(net_of, name, value):
    with pytest.raises(ValueError, match=rf"^{name} says how the model is read: SFRWrapper\(model, {name}="):
        sfr.SFRConfig.from_dict({name: value, "weight": 0.5})
    model = sfr.SFRWrapper(net_of())
    with pytest.raises(ValueError, match=rf"SFRWrapper\(model, {name}="):
        sfr.SFRLoss(model, {name: value})


@renamed
def test_the_criterion_refuses_old_keywords_and_says_what_to_write(net_of, old, new):
    model, gone = sfr.SFRWrapper(net_of()), [name for name in old if name not in SWITCHES]
    for name in gone:
        with pytest.raises(
            TypeError, match=rf"SFRLoss takes no argument '{name}'; it is called (feature_weight|alpha=Ramp)"
        ):
            sfr.SFRLoss(model, **{name: old[name]})


def settings_of(content: object) -> Iterator[dict[str, object]]:
    """Yield every dict of switches in what a JSON file holds, wherever it lies."""
    if isinstance(content, dict):
        if {"smoothing", "pairs", "cost"} <= content.keys():
            yield content
        for value in content.values():
            yield from settings_of(value)


def test_settings_of_all_recorded_results_can_be_read():
    read = others = 0
    for file in RESULTS.rglob("*.json"):
        for settings in settings_of(json.loads(file.read_text())):
            if any(settings.get(name, default) != default for name, default in OF_THE_WRAPPER.items()):
                with pytest.raises(ValueError, match=r"says how the model is read: SFRWrapper\(model, "):
                    sfr.SFRConfig.from_dict(settings)
                others += 1
                settings = {name: value for name, value in settings.items() if name not in OF_THE_WRAPPER}
            config = sfr.SFRConfig.from_dict(settings)
            written = json.loads(json.dumps(config.to_dict()))
            moves = settings.get("alpha_end") is not None
            default = {"momentum"} if settings.get("momentum") == 0.01 else set()
            for name in settings.keys() & set(SWITCHES) - ({"alpha"} if moves else set()) - default:
                assert written[name] == settings[name]
            if moves:
                assert config.alpha.at(10**9) == settings["alpha_end"]
            if "weight" in settings:
                assert config.weight_at(10**9) == settings["weight"]
                assert isinstance(config.feature_weight, sfr.Ramp) == bool(settings["warmup"])
            read += 1
    assert read > others > 0


# DynamicLabelSmoothing, whose alpha moved by names of its own.


@pytest.mark.parametrize(
    ("old", "alpha"),
    [
        ({"mode": "class_mean", "alpha_end": 0.9, "alpha_steps": 4}, sfr.Ramp(0.5, 0.9, steps=4)),
        ({"mode": "uniform", "alpha_end": 0.9, "alpha_steps": 4}, sfr.Ramp(0.1, 0.9, steps=4)),
        ({"mode": "uniform", "alpha": 0.4, "alpha_end": 0.0, "alpha_steps": 4}, sfr.Ramp(0.4, 0.0, steps=4)),
        (
            {"mode": "past", "num_samples": 8, "alpha": 0.0, "alpha_end": 0.8, "alpha_steps": 4},
            sfr.Ramp(0, 0.8, steps=4),
        ),
        ({"mode": "class_mean", "alpha": 0.3, "alpha_end": 0.3}, sfr.Ramp(0.3, 0.3, steps=1)),
    ],
)
@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "soft targets"])
def test_alpha_that_moves_by_its_old_names_moves_as_a_ramp(old, alpha, soft):
    with Deprecated() as deprecated:
        criterion = DynamicLabelSmoothing(**old)  # the caller's line
    assert "DynamicLabelSmoothing: these arguments go with the next release" in deprecated.message
    assert names_what_replaces(deprecated.message, old)
    kept = {name: value for name, value in old.items() if name in ("mode", "num_samples")}
    ramped = DynamicLabelSmoothing(**kept, alpha=alpha)
    if soft and old["mode"] == "past":
        pytest.skip("past predictions are for class indices")
    for step in range(6):
        logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
        target = (2 * logits).softmax(dim=1) if soft else torch.arange(8)
        assert criterion.current_alpha() == ramped.current_alpha()
        assert torch.equal(criterion(logits, target, torch.arange(8)), ramped(logits, target, torch.arange(8)))


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"alpha_end": -0.1, "alpha_steps": 4}, "alpha_end must .*; got -0.1"),
        ({"alpha_end": 2, "alpha_steps": 4}, "alpha_end must .*; got 2"),
        ({"alpha_steps": 0}, "alpha_steps must .*; got 0"),
        ({"alpha": 0.0, "alpha_end": 0.8}, "alpha_end=0.8 needs alpha_steps"),
        ({"alpha": 0.1, "alpha_steps": 5}, r"without effect.*alpha_steps \(of alpha_end"),
        ({"mode": "none", "alpha_end": 0.3, "alpha_steps": 5}, r"without effect.*alpha.*\(of mode="),
        (
            {"alpha": sfr.Ramp(0, 0.5, 3), "alpha_end": 0.8, "alpha_steps": 4},
            "alpha_end has no effect beside alpha=Ramp",
        ),
    ],
)
def test_old_names_of_alpha_that_cannot_be_are_refused(old, message):
    with Deprecated(), pytest.raises(ValueError, match=message):
        DynamicLabelSmoothing(**old)


def test_a_number_of_steps_of_a_wrong_type_is_refused_and_named():
    with Deprecated(), pytest.raises(TypeError, match=r"alpha_steps must be .*2.5"):
        DynamicLabelSmoothing(alpha_end=0.8, alpha_steps=2.5)
