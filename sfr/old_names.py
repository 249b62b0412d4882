"""Switches under the names of before 0.2, which are read for one release more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfr.checks import check_number, near_names
from sfr.ramp import Ramp

# Arguments of SFRWrapper, which configurations of before 0.2 held, too.
OF_THE_WRAPPER: dict[str, Any] = {"stages": None, "layout": "auto", "prefix_tokens": "auto"}
# Names of before 0.2, and what takes their place.
OLD_NAMES = {
    "weight": "feature_weight",
    "warmup": "feature_weight=Ramp(0, weight, warmup)",
    "alpha_end": "alpha=Ramp(alpha, alpha_end, alpha_steps)",
    "alpha_steps": "alpha=Ramp(alpha, alpha_end, alpha_steps)",
}


def near_old_names(name: object) -> str:
    """Return what takes the place of the old names that are spelled most like this one, for an error."""
    return ", ".join(repr(OLD_NAMES[old]) for old in OLD_NAMES if near_names(name, [old]))


def current_names(values: Mapping[str, Any], weight: float | Ramp, alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return switches under today's names, given those of before 0.2.

    Args:
        values: the switches given.
        weight: the default of the weight.
        alphas: the default of alpha for each kind of smoothing.

    Raises:
        ValueError: for an old switch without effect, or an argument of the wrapper that is not at its default.
    """
    for name, default in OF_THE_WRAPPER.items():
        if values.get(name, default) != default:
            raise ValueError(f"{name} says how the model is read: SFRWrapper(model, {name}={values[name]!r})")
    switches = {name: value for name, value in values.items() if name not in (*OF_THE_WRAPPER, *OLD_NAMES)}
    # 0.01 was the default, with or without effect: so it is in a whole configuration that lacks a field of later.
    earlier = {"pairs", "cost", "marginals"} <= values.keys() and "matching" not in values
    if switches.get("momentum") == 0.01 and (earlier or switches.get("smoothing", "none") in ("uniform", "none")):
        del switches["momentum"]
    if "weight" in values:
        switches["feature_weight"] = values["weight"]
    if any(name in values for name in OLD_NAMES):
        switches.setdefault("gate", "none")  # there was none
    warmup = values.get("warmup", 0)
    check_number("warmup", warmup, 0, whole=True)
    if warmup:
        end = switches.get("feature_weight", weight)
        if isinstance(end, Ramp):
            raise ValueError("warmup has no effect beside weight=Ramp(...), which says itself how the weight rises")
        switches["feature_weight"] = Ramp(0, end, warmup)
    end, steps = values.get("alpha_end"), values.get("alpha_steps", 1)
    check_number("alpha_steps", steps, 1, whole=True)
    if end is not None:
        default = alphas[switches.get("smoothing", "none")]
        switches["alpha"] = _ramp_of_alpha(switches.get("alpha"), default, end, steps)
    elif steps != 1:
        raise ValueError("without effect, leave out: alpha_steps (of alpha_end, to which alpha moves in these steps)")
    return switches


def _ramp_of_alpha(start: float | Ramp | None, default: float, end: float, steps: int) -> Ramp:
    """Return alpha as a ramp that ends at `end`."""
    check_number("alpha_end", end, 0, 1)
    if isinstance(start, Ramp):
        raise ValueError("alpha_end has no effect beside alpha=Ramp(...), which says itself how alpha moves")
    if end != start and steps == 1:
        raise ValueError(
            f"alpha_end={end!r} needs alpha_steps, the training steps over which alpha moves to it, at least 2: "
            "for a whole run the number of epochs times len(loader)"
        )
    return Ramp(default if start is None else start, end, steps)
