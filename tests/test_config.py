"""The switches of the loss and the settings of the stages: round trips, and what is refused and how."""

import json
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from typing import Any, get_type_hints

import numpy as np
import pytest
from torch import nn

import sfr
from sfr.config import Ramp, SFRConfig, Switches
from sfr.model.settings import StageSettings

FULL: dict[str, Any] = {
    "feature_weight": 0.7,
    "gate": "none",
    "pairs": ((0, 2), ("layer1", "layer2")),
    "detach_deep": False,
    "max_grid": 7,
    "grouping": "crop",
    "cost": "correlation",
    "marginals": "cross",
    "solver": "sinkhorn",
    "smoothing": "class_mean",
    "alpha": 0.3,
    "momentum": 0.05,
    "update": "epoch",
    "ignore_index": 255,
}
IN_PLACE: dict[str, Any] = {"matching": "in_place", "pairs": ((0.3, 0.7), (1, "layer4"))}
PAST: dict[str, Any] = {"smoothing": "past", "num_samples": 1000, "alpha": 0.3, "early_learning": 3}
RAMPS: dict[str, Any] = {
    "feature_weight": Ramp(0, 0.7, steps=100),
    "smoothing": "class_mean",
    "alpha": Ramp(0.3, 0.1, steps=50, after=10),
}
STAGES: dict[str, Any] = {"stages": ("layer1", "layer2", "layer3"), "layout": "sequence_first", "prefix_tokens": 1}
tables = pytest.mark.parametrize(
    "values",
    [{}, FULL, PAST, RAMPS, IN_PLACE],
    ids=["defaults", "fields of class means", "fields of past", "ramps", "in place"],
)
every_field = pytest.mark.parametrize("name", [field.name for field in fields(SFRConfig)])


def test_tables_of_this_test_cover_every_field_with_another_value_than_the_default() -> None:
    for table, kind in ((FULL | PAST | IN_PLACE, SFRConfig), (STAGES, StageSettings)):
        assert set(table) == {field.name for field in fields(kind)}
        assert all(value != getattr(kind(), name) for name, value in table.items())


def test_the_keyword_arguments_are_the_fields_with_their_types() -> None:
    assert get_type_hints(Switches) == get_type_hints(SFRConfig)
    assert list(get_type_hints(Switches)) == [field.name for field in fields(SFRConfig)]
    assert not Switches.__required_keys__


@tables
def test_dict_round_trip_gives_an_equal_config(values: dict[str, Any]) -> None:
    config = SFRConfig(**values)
    assert SFRConfig.from_dict(config.to_dict()) == config


@tables
def test_json_round_trip_gives_an_equal_config(values: dict[str, Any]) -> None:
    config = SFRConfig(**values)
    assert SFRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_the_defaults() -> None:
    assert SFRConfig.from_dict({"feature_weight": 0.5}) == SFRConfig(feature_weight=0.5)


def test_to_dict_holds_every_field() -> None:
    assert SFRConfig(**FULL).to_dict() == SFRConfig().to_dict() | FULL


def test_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"SFRConfig has no field \['feature_wieght'\]; .*'feature_weight'"):
        SFRConfig.from_dict({"feature_wieght": 0.1})
    with pytest.raises(
        ValueError, match=r"SFRConfig has no field \['qqqq'\]; it has 'feature_weight', .*'ignore_index'"
    ):
        SFRConfig.from_dict({"qqqq": 0.1})


@every_field
def test_no_field_can_be_assigned(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(SFRConfig(), name, (FULL | PAST | IN_PLACE)[name])


@pytest.mark.parametrize("name", list(STAGES))
def test_no_setting_of_the_stages_can_be_assigned(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(StageSettings(), name, STAGES[name])


def test_lists_become_tuples() -> None:
    pairs: Any = [[0, 1], ["layer1", "layer2"]]
    assert SFRConfig(pairs=pairs).pairs == ((0, 1), ("layer1", "layer2"))
    assert StageSettings(stages=["layer1", "layer2"]).stages == ("layer1", "layer2")


def test_changing_the_list_given_changes_no_settings() -> None:
    stages, pairs = ["layer1", "layer2"], [(0, 1)]
    settings, config = StageSettings(stages=stages), SFRConfig(pairs=pairs)
    stages.append("layer3")
    pairs.append((0, 2))
    assert settings.stages == ("layer1", "layer2")
    assert config.pairs == ((0, 1),)


def test_equal_configs_have_equal_hashes() -> None:
    listed = {**FULL, "pairs": [list(pair) for pair in FULL["pairs"]]}
    assert hash(SFRConfig(**listed)) == hash(SFRConfig(**FULL))
    assert hash(StageSettings(**{**STAGES, "stages": list(STAGES["stages"])})) == hash(StageSettings(**STAGES))


def test_regular_expression_for_the_stages_stays_a_string() -> None:
    assert StageSettings(stages=r"layer\d").stages == r"layer\d"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feature_weight", 0),
        ("feature_weight", 1e6),
        ("max_grid", 1),
        ("alpha", 0),
        ("alpha", 1.0),
        ("momentum", 1),
        ("momentum", 1e-6),
    ],
)
def test_value_at_the_end_of_its_range_is_taken(name: str, value: float) -> None:
    smoothing: Any = "class_mean" if name in ("alpha", "momentum") else "none"
    assert getattr(SFRConfig(smoothing=smoothing, **{name: value}), name) == value


@pytest.mark.parametrize("value", [0.0, 1])
def test_value_at_the_end_of_the_range_of_alpha_is_one_to_move_to(value: float) -> None:
    config = SFRConfig(smoothing="class_mean", alpha=Ramp(0.5, value, steps=2))
    assert isinstance(config.alpha, Ramp)
    assert config.alpha.at(2) == value


def test_no_prefix_token_is_a_number_of_them() -> None:
    assert StageSettings(prefix_tokens=0).prefix_tokens == 0


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"smoothing": "none", "alpha": 0.9}, "alpha (of smoothing='class_mean' or 'past' or 'uniform')"),
        ({"smoothing": "none", "alpha": Ramp(0, 0.9, steps=5)}, "alpha (of smoothing="),
        ({"smoothing": "uniform", "momentum": 0.5}, "momentum (of smoothing='class_mean' or 'past')"),
        ({"smoothing": "past", "num_samples": 9, "update": "epoch"}, "update (of smoothing='class_mean')"),
        ({"smoothing": "none", "alpha": 0.9, "momentum": 0.5, "update": "epoch"}, "'uniform'); momentum (of"),
        ({"smoothing": "none", "momentum": 0.5, "update": "epoch"}, "'past'); update (of smoothing='class_mean')"),
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


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[
            (name, value, ValueError)
            for name in ("grouping", "cost", "marginals", "solver", "smoothing", "update")
            for value in ("unknown", None, 3, "", ("auto",))
        ],
        ("feature_weight", -0.1, ValueError),
        ("feature_weight", float("nan"), ValueError),
        ("feature_weight", float("inf"), ValueError),
        ("feature_weight", "0.1", TypeError),
        ("feature_weight", True, TypeError),
        ("feature_weight", None, TypeError),
        ("max_grid", 0, ValueError),
        ("max_grid", 4.0, TypeError),
        ("max_grid", (4, 4), TypeError),
        ("alpha", -0.1, ValueError),
        ("alpha", 1.1, ValueError),
        ("alpha", float("nan"), ValueError),
        ("alpha", "half", TypeError),
        ("momentum", 0, ValueError),
        ("momentum", 1.01, ValueError),
        ("momentum", "half", TypeError),
        ("ignore_index", 0.5, TypeError),
        ("detach_deep", 1, TypeError),
        ("detach_deep", None, TypeError),
        ("pairs", "first", ValueError),
        ("pairs", None, TypeError),
        ("pairs", 3, TypeError),
    ],
)
def test_bad_value_is_refused_with_field_and_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must ") as caught:
        SFRConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[("layout", value, ValueError) for value in ("unknown", None, 3, "", ("auto",))],
        ("prefix_tokens", -1, ValueError),
        ("prefix_tokens", "none", TypeError),
        ("prefix_tokens", 1.0, TypeError),
        ("prefix_tokens", True, TypeError),
        ("stages", 3, TypeError),
    ],
)
def test_bad_setting_of_the_stages_is_refused_with_field_and_value(
    make_net: Any, name: str, value: Any, error: type[Exception]
) -> None:
    for build in (StageSettings, lambda **settings: sfr.SFRWrapper(make_net(), **settings)):
        with pytest.raises(error, match=rf"^{name} must ") as caught:
            build(**{name: value})
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "error", "culprit"),
    [
        ((0,), ValueError, (0,)),
        ((0, 1, 2), ValueError, (0, 1, 2)),
        ("ab", ValueError, "ab"),
        (3, ValueError, 3),
        ((0, 1.5), ValueError, 1.5),
        ((0.0, 1), ValueError, 0.0),
        ((0, [1]), TypeError, [1]),
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
        StageSettings(stages=stages)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float16(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_numpy_become_those_of_python(number: Any) -> None:
    of_numpy: dict[str, Any] = {"feature_weight": number, "alpha": number, "momentum": number}
    of_numpy |= {"max_grid": np.int64(3), "ignore_index": np.uint8(255)}
    config = SFRConfig(smoothing="class_mean", **of_numpy)
    plain: dict[str, Any] = dict.fromkeys(("feature_weight", "alpha", "momentum"), 0.25)
    assert config == SFRConfig(smoothing="class_mean", **plain, max_grid=3, ignore_index=255)
    assert {type(value) for value in config.to_dict().values()} <= {float, int, str, bool, type(None)}
    assert SFRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("number", [np.float32(0.25), np.float16(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_numpy_in_a_ramp_become_those_of_python(number: Any) -> None:
    steps: Any = np.uint8(2)
    config = SFRConfig(feature_weight=Ramp(number, number, steps, after=steps))
    assert config == SFRConfig(feature_weight=Ramp(0.25, 0.25, 2, after=2))
    assert {type(value) for value in config.to_dict()["feature_weight"].values()} == {float, int}
    assert SFRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_number_of_tokens_of_numpy_becomes_one_of_python() -> None:
    tokens: Any = np.int64(1)
    assert type(StageSettings(prefix_tokens=tokens).prefix_tokens) is int


def test_stages_of_pairs_may_be_integers_of_numpy() -> None:
    config = SFRConfig(pairs=[(np.int64(0), np.int32(1))])  # type: ignore[list-item]
    assert json.dumps(config.to_dict()["pairs"]) == "[[0, 1]]"


@pytest.mark.parametrize(
    ("name", "value"), [("max_grid", np.float32(4)), ("feature_weight", np.bool_(True)), ("alpha", 1j)]
)
def test_numbers_of_numpy_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        SFRConfig(**{name: value})


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), np.float32(-1)])
def test_numbers_of_numpy_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="feature_weight must"):
        SFRConfig(feature_weight=value)


def test_a_ramp_of_alpha_survives_json_and_reaches_the_criterion(make_net: Any) -> None:
    config = SFRConfig(smoothing="class_mean", alpha=Ramp(0, 0.8, steps=10))
    again = SFRConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    criterion = sfr.SFRLoss(sfr.SFRWrapper(make_net()), again)
    assert criterion.labels.alpha == Ramp(0, 0.8, steps=10)


# How SFRLoss takes its switches.


def test_a_config_a_mapping_and_keyword_arguments_are_the_same_switches(make_net: Any) -> None:
    model = sfr.SFRWrapper(make_net())
    for config in (SFRConfig(**FULL), FULL, SFRConfig(**FULL).to_dict()):
        assert sfr.SFRLoss(model, config).config == SFRConfig(**FULL)
    assert sfr.SFRLoss(model, **FULL).config == SFRConfig(**FULL)
    assert sfr.SFRLoss(model).config == SFRConfig()


@pytest.mark.parametrize("smoothing", ["none", "uniform"])
def test_a_momentum_that_was_the_default_and_had_no_effect_is_read(smoothing: Any) -> None:
    written = SFRConfig(smoothing=smoothing).to_dict() | {"momentum": 0.01}
    assert SFRConfig.from_dict(written) == SFRConfig(smoothing=smoothing)


def test_a_momentum_of_past_predictions_is_read_unless_it_was_written_before_there_was_one() -> None:
    config = SFRConfig(smoothing="past", num_samples=9, momentum=0.01)
    assert SFRConfig.from_dict(config.to_dict()) == config
    assert SFRConfig.from_dict({"smoothing": "past", "num_samples": 9, "momentum": 0.01}) == config
    earlier = {name: value for name, value in config.to_dict().items() if name != "matching"}
    assert SFRConfig.from_dict(earlier) == SFRConfig(smoothing="past", num_samples=9)


def test_keyword_arguments_replace_the_fields_of_the_config_given(make_net: Any) -> None:
    model, config = sfr.SFRWrapper(make_net()), SFRConfig(feature_weight=0.1, pairs="last")
    for given in (config, config.to_dict(), {"feature_weight": 0.1, "pairs": "last"}):
        assert sfr.SFRLoss(model, given, pairs="adjacent").config == SFRConfig(feature_weight=0.1, pairs="adjacent")
    assert config == SFRConfig(feature_weight=0.1, pairs="last")


def test_a_bad_switch_of_the_loss_is_refused_with_field_and_value(make_net: Any) -> None:
    model = sfr.SFRWrapper(make_net())
    with pytest.raises(ValueError, match=r"^max_grid must .*got 0"):
        sfr.SFRLoss(model, max_grid=0)
    with pytest.raises(ValueError, match=r"SFRConfig has no field \['max_gird'\]; .*'max_grid'"):
        sfr.SFRLoss(model, {"max_gird": 4})


@every_field
def test_a_misspelt_switch_of_the_loss_is_an_error_with_the_near_name(make_net: Any, name: str) -> None:
    misspelt = name[0] + name[2] + name[1] + name[3:]
    assert misspelt != name
    with pytest.raises(TypeError, match=rf"SFRLoss takes no argument '{misspelt}'; near names: .*'{name}'"):
        sfr.SFRLoss(sfr.SFRWrapper(make_net()), **{misspelt: (FULL | PAST | IN_PLACE)[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [*STAGES.items(), ("record_in_eval", True), ("example_input", (1, 2))],
    ids=lambda value: str(value),
)
def test_an_argument_of_the_wrapper_given_to_the_loss_says_where_it_belongs(
    make_net: Any, name: str, value: Any
) -> None:
    model, arguments = sfr.SFRWrapper(make_net()), {name: value}
    with pytest.raises(TypeError) as caught:
        sfr.SFRLoss(model, **arguments)
    assert str(caught.value) == (
        f"SFRLoss takes no argument {name!r}; set it where the model is wrapped: SFRWrapper(model, {name}={value!r})"
    )


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss, lambda output, target: output.mean()])
def test_a_loss_of_ones_own_by_position_says_how_it_is_given(make_net: Any, loss: Any) -> None:
    with pytest.raises(TypeError, match=rf"config must be an SFRConfig .*; got {type(loss).__name__}.*label_loss="):
        sfr.SFRLoss(sfr.SFRWrapper(make_net()), loss)
