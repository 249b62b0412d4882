"""The arguments of SFRWrapper and SFRLoss: checked, and what to write for those that they do not take."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from torch import nn

from sfr.checks import near_names
from sfr.config import IGNORE_INDEX, SFRConfig, no_such_field
from sfr.old_names import OF_THE_WRAPPER, OLD_NAMES, near_old_names
from sfr.ramp import Ramp

MEAN = (
    "the loss is the mean over the batch: multiply it by len(target) for the sum; the plain losses of single images "
    "are nn.CrossEntropyLoss(reduction='none')(output, target)"
)
INSTEAD = {
    "label_smoothing": "label smoothing of 0.1 is SFRLoss(model, smoothing='uniform', alpha=0.1)",
    "reduction": MEAN,
    "size_average": MEAN,
    "reduce": MEAN,
}
CLASS_WEIGHTS = "for class weights pass a loss of your own: label_loss=nn.CrossEntropyLoss(weight=...)"


def configuration(config: object, switches: Mapping[str, Any], default: SFRConfig) -> SFRConfig:
    """Return the configuration of a criterion: `config` or the default, with some switches replaced.

    Raises:
        TypeError: if `config` is not a configuration, or for an unknown switch, saying what to write instead.
    """
    unknown = [name for name in switches if name not in SFRConfig.__dataclass_fields__]
    if unknown:
        raise TypeError(f"SFRLoss takes no argument {unknown[0]!r}; {_instead(unknown[0], switches[unknown[0]])}")
    if isinstance(config, Mapping):
        config = SFRConfig.from_dict(config)
    if config is not None and not isinstance(config, SFRConfig):
        raise TypeError(
            f"config must be an SFRConfig or a mapping of its fields; got {type(config).__name__}. A loss of your own "
            "is given by name, as in SFRLoss(model, label_loss=nn.BCEWithLogitsLoss())"
        )
    return dataclasses.replace(config or default, **switches)


def check_label_loss(
    label_loss: object, config: SFRConfig, switches: Mapping[str, Any], num_classes: int | None
) -> None:
    """Raise if the user's own loss cannot be called, or if one of the other arguments asks for what it makes idle."""
    if label_loss is not None and switches.get("gate", "none") != "none":
        raise ValueError(
            f"gate={switches['gate']!r} has no effect beside label_loss, where the feature term always counts in full: "
            "leave one of them out"
        )
    if label_loss is not None and (num_classes is not None or config.ignore_index != IGNORE_INDEX):
        idle = f"ignore_index={config.ignore_index}" if num_classes is None else f"num_classes={num_classes}"
        raise ValueError(f"{idle} has no effect beside label_loss, which takes the whole target: give it to that loss")
    if isinstance(label_loss, type):
        name = label_loss.__name__
        raise TypeError(f"label_loss must be an instance; got the class {name}: pass label_loss={name}(...)")
    if label_loss is not None and not callable(label_loss):
        raise TypeError(f"label_loss must be a function of output and target, or None; got {label_loss!r}")
    if label_loss is not None and config.smoothing != "none":
        raise ValueError(
            f"smoothing={config.smoothing!r} has no effect beside label_loss, which replaces the label term: "
            "leave one of them out"
        )


def width_of(model: nn.Module) -> int | None:
    """Return the width of the last layer of a model, by which its classes are counted before there are logits."""
    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    if not layers:
        return None
    return getattr(layers[-1], "out_features", getattr(layers[-1], "out_channels", None))


def check_wrapper_arguments(names: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` if the wrapper is given a name that is not a switch either."""
    message = no_such_field(names, also=(*OF_THE_WRAPPER, *OLD_NAMES, "example_input", "record_in_eval"))
    if message:
        raise TypeError(f"SFRWrapper has no argument {message}")


def _instead(name: str, value: object) -> str:
    """Return what to write for an argument that SFRLoss does not take: of nn.CrossEntropyLoss, old, or misspelled."""
    if name == "weight" and not isinstance(value, (numbers.Real, Ramp)):
        return CLASS_WEIGHTS
    if name in INSTEAD:
        return INSTEAD[name]
    if name in OLD_NAMES:
        return f"it is called {OLD_NAMES[name]}"
    if name in (*OF_THE_WRAPPER, "example_input", "record_in_eval"):
        shown = repr(value) if isinstance(value, (str, int, list, tuple)) else "..."
        return f"set it where the model is wrapped: SFRWrapper(model, {name}={shown})"
    known = [*SFRConfig.__dataclass_fields__, "label_loss", "num_classes", "supervisor"]
    near = near_names(name, known) or near_old_names(name)
    return f"near names: {near}" if near else f"it takes {', '.join(known)}"
