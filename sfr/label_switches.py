"""The switches of the label term: what they are where none is given, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from sfr.checks import check_number
from sfr.ramp import Ramp

Smoothing: TypeAlias = Literal["class_mean", "past", "uniform", "none"]
Update: TypeAlias = Literal["running", "epoch"]

DEFAULT_ALPHA: dict[str, float] = {"class_mean": 0.5, "past": 0.5, "uniform": 0.1, "none": 0.0}
DEFAULT_MOMENTUM: dict[str, float] = {"class_mean": 0.01, "past": 1.0}
EARLY_MOMENTUM = 0.3  # of past predictions, with early learning: that of Liu et al. for ten classes
# Fields of the label term: the value by which they have no effect, and the kinds of smoothing with which they have one.
EFFECTIVE: dict[str, tuple[Any, tuple[Smoothing, ...]]] = {
    "alpha": (None, ("class_mean", "past", "uniform")),
    "momentum": (None, ("class_mean", "past")),
    "update": ("running", ("class_mean",)),
    "early_learning": (0.0, ("past",)),
}


def check_num_samples(argument: str, mode: Smoothing, value: int | None) -> None:
    """Raise unless the number of training samples is given where, and only where, the label term needs it."""
    if (value is None) == (mode == "past"):
        raise ValueError(f"num_samples must be given for {argument}='past' and only then; got {value!r}")
    if value is not None:
        check_number("num_samples", value, 1, whole=True)


def check_effect(argument: str, smoothing: Smoothing, values: Mapping[str, Any]) -> None:
    """Raise if fields of the label term are given and have no effect.

    Args:
        argument: what the kind of smoothing is called there.
        smoothing: its value.
        values: the fields by name.
    """
    idle: dict[tuple[Smoothing, ...], list[str]] = {}
    for name, value in values.items():
        without_effect, kinds = EFFECTIVE[name]
        if value != without_effect and smoothing not in kinds:
            idle.setdefault(kinds, []).append(name)
    if idle:
        which = "; ".join(f"{', '.join(names)} (of {argument}={_either(kinds)})" for kinds, names in idle.items())
        raise ValueError(f"without effect with {argument}={smoothing!r}, leave out: {which}")


def _either(kinds: tuple[Smoothing, ...]) -> str:
    return " or ".join(map(repr, kinds))


def check_alpha(alpha: float | Ramp | None) -> None:
    """Raise if alpha leaves [0, 1]."""
    if isinstance(alpha, Ramp):
        for name in ("start", "end"):
            check_number(f"alpha: the {name} of the ramp", getattr(alpha, name), 0, 1)
    elif alpha is not None:
        check_number("alpha", alpha, 0, 1)


def check_momentum(momentum: float | None) -> None:
    """Raise if the momentum leaves (0, 1]."""
    if momentum is not None:
        check_number("momentum", momentum, 1e-6, 1)


def check_early_learning(weight: float | Ramp, momentum: float | None) -> None:
    """Raise if the weight is negative, or if the targets were the very predictions that are drawn towards them."""
    if not isinstance(weight, Ramp):  # which checks itself
        check_number("early_learning", weight, 0)
    if Ramp.of(weight).largest and momentum == 1:
        raise ValueError(
            "early_learning needs a running mean of several predictions, momentum below 1: drawn towards its newest "
            "prediction alone the network soon says one class of all samples"
        )


def momentum_of(smoothing: Smoothing, momentum: float | None, early_learning: float | Ramp) -> float:
    """Return the momentum of the label term, given what was stated."""
    if momentum is not None:
        return momentum
    return EARLY_MOMENTUM if early_learning else DEFAULT_MOMENTUM.get(smoothing, 1.0)
