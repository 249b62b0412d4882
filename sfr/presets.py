"""Presets: the switches for a purpose, each with what it gained where it was measured."""

from __future__ import annotations

from typing import Any

from sfr.checks import check_choice
from sfr.config import Preset, SFRConfig
from sfr.ramp import Ramp


def preset(purpose: Preset, *, num_samples: int, steps: int | None = None, **switches: Any) -> SFRConfig:
    """Return the configuration for a purpose.

    Both are for a loader that tells which sample is which, since targets move towards what the network predicted for
    the same sample when it last saw it: call ``criterion(logits, target, index=index)``.

    - "few-labels": a training that fits its labels long before it ends. `alpha` rises from 0 to 0.8.
    - "noisy-labels": some labels are wrong, and the training is long enough to learn them by heart. `alpha` is 0.8 from
      the start, with which a network learns more slowly: a training of a few epochs ends too early.

    For other purposes nothing was found that gains more than the default; docs/accuracy.md tells what was tried.

    Args:
        purpose: one of these.
        num_samples: samples of the training set, >= 1.
        steps: training steps in all, epochs times batches, >= 1; for "few-labels" and only then.
        **switches: fields of :class:`sfr.SFRConfig`, which replace those of the preset.

    Raises:
        TypeError, ValueError: for an unknown purpose, missing steps, or as :class:`sfr.SFRConfig`.

    Example:
        >>> SFRConfig.preset("noisy-labels", num_samples=50_000).alpha
        0.8
    """
    check_choice("purpose", purpose, Preset)
    if (steps is None) == (purpose == "few-labels"):
        raise ValueError(f"steps, epochs times batches, must be given for 'few-labels' and only then; got {steps!r}")
    alpha = 0.8 if steps is None else Ramp(0.0, 0.8, steps)
    return SFRConfig.from_dict({"smoothing": "past", "num_samples": num_samples, "alpha": alpha} | switches)
