"""Presets: the switches of the loss for a purpose."""

from __future__ import annotations

from typing import Any

from sfr.checks import check_choice, check_number
from sfr.config import Preset, SFRConfig
from sfr.ramp import Ramp


def preset(purpose: Preset, *, num_samples: int, steps: int, **switches: Any) -> SFRConfig:
    """Return the configuration for a purpose.

    Both are for a loader that tells which sample is which, since they keep what the network predicted for it: call
    ``criterion(logits, target, index=index)``.

    - "few-labels": a training that fits its labels long before it ends. Targets move towards the last prediction;
      `alpha` rises from 0 to 0.8 over the whole of it.
    - "noisy-labels": some labels are wrong, and the training is long enough to learn them by heart. Targets stay, and
      `early_learning` keeps the network to the running mean of its predictions; it rises to 3 over the first tenth.

    docs/methods/past-predictions.md has what they gained. For other purposes nothing was found that gains more than the
    default.

    Args:
        purpose: one of these.
        num_samples: samples of the training set, >= 1.
        steps: training steps in all, epochs times batches, >= 1.
        **switches: fields of :class:`sfr.SFRConfig`, which replace those of the preset.

    Raises:
        TypeError, ValueError: for an unknown purpose, or as :class:`sfr.SFRConfig`.

    Example:
        >>> SFRConfig.preset("noisy-labels", num_samples=50_000, steps=40_000).early_learning
        Ramp(start=0.0, end=3.0, steps=4000, after=0)
    """
    check_choice("purpose", purpose, Preset)
    check_number("steps", steps, 1, whole=True)
    if purpose == "few-labels":
        own: dict[str, Any] = {"alpha": Ramp(0.0, 0.8, steps)}
    else:
        own = {"alpha": 0.0, "early_learning": Ramp(0.0, 3.0, max(1, steps // 10))}
    return SFRConfig.from_dict({"smoothing": "past", "num_samples": num_samples} | own | switches)
