"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping

# Packages between the user's line and ours.
BETWEEN = ("sfr", "torch", "accelerate")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the line outside of these packages that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def deprecated(function: str, instead: Mapping[str, str]) -> None:
    """Warn of arguments that go with the next release, and say what takes their place."""
    names = "; ".join(f"{old}= becomes {new}" for old, new in instead.items())
    warn_user(f"{function}: these arguments go with the next release: {names}", DeprecationWarning)
