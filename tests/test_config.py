"""SFRConfig: round trips, what is refused and how, and that it never changes once built."""

import json
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfr
from sfr.config import Ramp, SFRConfig

FULL: dict[str, Any] = {
    "stages": ("layer1", "layer2", "layer3"),
    "layout": "channels_last",
    "prefix_tokens": 1,
    "weight": 0.7,
    "warmup": 100,
    "pairs": ((0, 2), ("layer1", "layer2")),
    "detach_deep": False,
    "max_grid": 7,
    "grouping": "crop",
    "cost": "correlation",
    "marginals": "cross",
    "solver": "sinkhorn",
    "smoothing": "class_mean",
    "alpha": 0.3,
    "alpha_end": 0.1,
    "alpha_steps": 50,
    "momentum": 0.05,
    "update": "epoch",
    "ignore_index": 255,
}
PAST: dict[str, Any] = {"smoothing": "past", "num_samples": 1000, "alpha": 0.3}
tables = pytest.mark.parametrize(
    "values", [{}, FULL, PAST], ids=["defaults", "fields of class means", "fields of past"]
)


def test_tables_of_this_test_cover_every_field_with_another_value_than_the_default() -> None:
    assert set(FULL) | set(PAST) == {field.name for field in fields(SFRConfig)}
    assert all(value != getattr(SFRConfig(), name) for name, value in (FULL | PAST).items())


@tables
def test_dict_round_trip_gives_an_equal_config(values: dict[str, Any]) -> None:
    config = SFRConfig(**values)
    assert SFRConfig.from_dict(config.to_dict()) == config


@tables
def test_json_round_trip_gives_an_equal_config(values: dict[str, Any]) -> None:
    config = SFRConfig(**values)
    assert SFRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_the_defaults() -> None:
    assert SFRConfig.from_dict({"weight": 0.5}) == SFRConfig(weight=0.5)


def test_to_dict_holds_every_field() -> None:
    assert SFRConfig(**FULL).to_dict() == SFRConfig().to_dict() | FULL


def test_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"SFRConfig has no field \['wieght'\]; it has .*'weight'"):
        SFRConfig.from_dict({"wieght": 0.1})


@pytest.mark.parametrize("name", list(FULL | PAST))
def test_no_field_can_be_assigned(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(SFRConfig(), name, (FULL | PAST)[name])


def test_lists_become_tuples() -> None:
    config = SFRConfig(stages=["layer1", "layer2"], pairs=[[0, 1], ["layer1", "layer2"]])  # type: ignore[list-item]
    assert (config.stages, config.pairs) == (("layer1", "layer2"), ((0, 1), ("layer1", "layer2")))


def test_changing_the_list_given_changes_no_config() -> None:
    stages = ["layer1", "layer2"]
    config = SFRConfig(stages=stages)
    stages.append("layer3")
    assert config.stages == ("layer1", "layer2")


def test_equal_configs_have_equal_hashes() -> None:
    listed = {**FULL, "stages": list(FULL["stages"]), "pairs": [list(pair) for pair in FULL["pairs"]]}
    assert hash(SFRConfig(**listed)) == hash(SFRConfig(**FULL))


def test_regular_expression_for_the_stages_stays_a_string() -> None:
    assert SFRConfig(stages=r"layer\d").stages == r"layer\d"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", 0),
        ("weight", 1e6),
        ("prefix_tokens", 0),
        ("warmup", 0),
        ("max_grid", 1),
        ("alpha", 0),
        ("alpha", 1.0),
        ("alpha_steps", 1),
        ("momentum", 1),
        ("momentum", 1e-6),
    ],
)
def test_value_at_the_end_of_its_range_is_taken(name: str, value: float) -> None:
    smoothing: Any = "class_mean" if name in ("alpha", "momentum") else "none"
    assert getattr(SFRConfig(smoothing=smoothing, **{name: value}), name) == value


@pytest.mark.parametrize("value", [0.0, 1])
def test_value_at_the_end_of_the_range_of_alpha_is_one_to_move_to(value: float) -> None:
    assert SFRConfig(smoothing="class_mean", alpha_end=value, alpha_steps=2).alpha_end == value


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_alpha_that_moves_without_the_length_of_its_way_is_refused(alpha: float | None) -> None:
    with pytest.raises(ValueError, match=r"alpha_end=0.8 needs alpha_steps, .* at least 2.*len\(loader\)"):
        SFRConfig(smoothing="class_mean", alpha=alpha, alpha_end=0.8)


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"smoothing": "none", "alpha": 0.9}, "alpha (of smoothing='class_mean' or 'past' or 'uniform')"),
        ({"smoothing": "none", "alpha_end": 0.9, "alpha_steps": 5}, "alpha_end, alpha_steps (of smoothing="),
        ({"smoothing": "uniform", "momentum": 0.5}, "momentum (of smoothing='class_mean')"),
        ({"smoothing": "past", "num_samples": 9, "update": "epoch"}, "update (of smoothing='class_mean')"),
        ({"smoothing": "none", "alpha": 0.9, "momentum": 0.5, "update": "epoch"}, "'uniform'); momentum, update (of"),
        ({"smoothing": "uniform", "alpha": 0.5, "alpha_steps": 5}, "alpha_steps (of alpha_end"),
    ],
)
def test_fields_of_the_label_term_without_effect_are_refused_with_what_they_belong_to(
    values: dict[str, Any], idle: str
) -> None:
    with pytest.raises(ValueError, match=r"^without effect.*leave out: ") as caught:
        SFRConfig(**values)
    assert idle in str(caught.value)


@pytest.mark.parametrize("smoothing", ["class_mean", "uniform", "none"])
def test_fields_without_effect_may_be_at_their_defaults(smoothing: Any) -> None:
    values = SFRConfig(smoothing=smoothing).to_dict()
    assert SFRConfig.from_dict(values).to_dict() == values


def test_settings_of_all_recorded_results_can_be_read() -> None:
    files = (Path(__file__).parents[1] / "benchmarks/results/accuracy").rglob("*.json")
    settings = [json.loads(file.read_text()).get("settings") for file in files]
    known = {field.name for field in fields(SFRConfig)}
    of_sfr = [values for values in settings if values and "smoothing" in values]
    assert of_sfr
    for values in of_sfr:
        SFRConfig.from_dict({name: value for name, value in values.items() if name in known})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[
            (name, value, ValueError)
            for name in ("layout", "grouping", "cost", "marginals", "solver", "smoothing", "update")
            for value in ("unknown", None, 3, "", ("auto",))
        ],
        ("weight", -0.1, ValueError),
        ("weight", float("nan"), ValueError),
        ("weight", float("inf"), ValueError),
        ("weight", "0.1", TypeError),
        ("weight", True, TypeError),
        ("weight", None, TypeError),
        ("prefix_tokens", -1, ValueError),
        ("prefix_tokens", "none", TypeError),
        ("prefix_tokens", 1.0, TypeError),
        ("warmup", -1, ValueError),
        ("warmup", 1.5, TypeError),
        ("warmup", True, TypeError),
        ("max_grid", 0, ValueError),
        ("max_grid", 4.0, TypeError),
        ("max_grid", (4, 4), TypeError),
        ("alpha", -0.1, ValueError),
        ("alpha", 1.1, ValueError),
        ("alpha", float("nan"), ValueError),
        ("alpha", "half", TypeError),
        ("alpha_end", -1, ValueError),
        ("alpha_end", 2, ValueError),
        ("alpha_end", True, TypeError),
        ("alpha_steps", 0, ValueError),
        ("alpha_steps", 10.0, TypeError),
        ("momentum", 0, ValueError),
        ("momentum", 1.01, ValueError),
        ("momentum", None, TypeError),
        ("ignore_index", 0.5, TypeError),
        ("detach_deep", 1, TypeError),
        ("detach_deep", None, TypeError),
        ("pairs", "first", ValueError),
        ("pairs", None, TypeError),
        ("pairs", 3, TypeError),
        ("stages", 3, TypeError),
    ],
)
def test_bad_value_is_refused_with_field_and_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must ") as caught:
        SFRConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "error", "culprit"),
    [
        ((0,), ValueError, (0,)),
        ((0, 1, 2), ValueError, (0, 1, 2)),
        ("ab", ValueError, "ab"),
        (3, ValueError, 3),
        ((0, 1.5), TypeError, 1.5),
        ((True, 1), TypeError, True),
        ((None, 1), TypeError, None),
    ],
)
def test_bad_pair_is_refused_with_field_and_value(pair: Any, error: type[Exception], culprit: object) -> None:
    with pytest.raises(error, match=r"^pairs must ") as caught:
        SFRConfig(pairs=[(0, 1), pair])
    assert f"got {culprit!r}" in str(caught.value)


def test_empty_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one"):
        SFRConfig(pairs=[])


@pytest.mark.parametrize("stages", [(1, 2), ("layer1", None), b"layer"])
def test_stages_that_are_no_names_are_refused(stages: Any) -> None:
    with pytest.raises(TypeError, match=r"^stages must "):
        SFRConfig(stages=stages)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float16(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_numpy_become_those_of_python(number: Any) -> None:
    of_numpy: dict[str, Any] = {"weight": number, "alpha": number, "momentum": number}
    of_numpy |= {"max_grid": np.int64(3), "warmup": np.uint8(2)}
    config = SFRConfig(smoothing="class_mean", **of_numpy)
    assert config == SFRConfig(smoothing="class_mean", weight=0.25, alpha=0.25, momentum=0.25, max_grid=3, warmup=2)
    assert {type(value) for value in config.to_dict().values()} <= {float, int, str, bool, type(None)}
    assert SFRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_stages_of_pairs_may_be_integers_of_numpy() -> None:
    config = SFRConfig(pairs=[(np.int64(0), np.int32(1))])  # type: ignore[list-item]
    assert json.dumps(config.to_dict()["pairs"]) == "[[0, 1]]"


@pytest.mark.parametrize(("name", "value"), [("max_grid", np.float32(4)), ("weight", np.bool_(True)), ("alpha", 1j)])
def test_numbers_of_numpy_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        SFRConfig(**{name: value})


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), np.float32(-1)])
def test_numbers_of_numpy_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="weight must"):
        SFRConfig(weight=value)


def test_a_ramp_of_alpha_survives_json_and_reaches_the_criterion(make_net):
    config = SFRConfig(smoothing="class_mean", alpha=Ramp(0, 0.8, steps=10))
    again = SFRConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net(), again))
    assert criterion.labels.alpha == Ramp(0, 0.8, steps=10)
