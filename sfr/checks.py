"""Checks of arguments: errors that name the argument, the value got and what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Raise a ``ValueError`` naming `argument` unless `value` is one of the options of the ``Literal`` `choices`."""
    allowed = choices.__args__  # not get_args(), which torch.compile could not trace before torch 2.7
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_number(argument: str, value: object, low: float, high: float = float("inf"), *, whole: bool = False) -> None:
    """Raise unless `value` is a finite number (an integer if `whole`), of Python's or NumPy's, in [`low`, `high`]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        kind = "an integer" if whole else "a number"
        raise TypeError(f"{argument} must be {kind}; got {type(value).__name__} {value!r}")
    number: Any = value
    if not math.isfinite(number) or not low <= number <= high:
        allowed = f"lie in [{low}, {high}]" if math.isfinite(high) else f"be finite and at least {low}"
        raise ValueError(f"{argument} must {allowed}; got {value!r}")


def check_floating(argument: str, value: object, of: str = "") -> None:
    """Raise a ``TypeError`` unless `value` is a floating-point tensor; the message says `of` what."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{argument} must be a floating-point tensor{of}; got {kind}")


def plain_number(value: Any) -> Any:
    """Return a number or truth value of NumPy's as one of Python's, which JSON can hold; anything else as it is."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def near_names(name: object, known: Iterable[str], count: int = 3) -> str:
    """Return the known names that are spelled most like this one, for an error; "" if there are none."""
    return ", ".join(map(repr, difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5)))


def items(argument: str, value: object) -> tuple[Any, ...]:
    """Return a sequence as a tuple, or raise a ``TypeError`` naming `argument`."""
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a sequence or a string; got {type(value).__name__} {value!r}")
    return tuple(value.tolist() if isinstance(value, np.ndarray) else value)
