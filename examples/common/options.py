"""Types of command line options."""

import argparse
import ast
from collections.abc import Callable
from typing import Any


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of a whole number in this range."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {value}")
        return value

    return integer


positive, not_negative = whole(1), whole(0)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {value}")
    return value


def key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
