"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings

# Packages between the user's line and ours.
BETWEEN = ("sfr", "torch", "accelerate")


def warn_user(message: str) -> None:
    """Warn, and name the line outside of these packages that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
