"""Numbers of several seeds as text: means with their spread, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, stdev


def differences(left: Mapping[int, float], right: Mapping[int, float]) -> list[float]:
    """Return the paired differences in percentage points, over the seeds that both have."""
    return [100 * (left[seed] - right[seed]) for seed in sorted(left.keys() & right.keys())]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation; without the latter for a single value."""
    return _with_margin(values, stdev(values) if len(values) > 1 else None, sign)


def with_error(values: Sequence[float], sign: str = "+") -> str:
    """Return mean ± standard error of the mean; without the latter for a single value."""
    return _with_margin(values, standard_error(values), sign)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, None for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def _with_margin(values: Sequence[float], margin: float | None, sign: str) -> str:
    if not values:
        return ""
    return f"{mean(values):{sign}.2f}" + ("" if margin is None else f" ± {margin:.2f}")
