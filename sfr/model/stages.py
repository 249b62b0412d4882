"""Looks stages up by name or regular expression."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from sfr.checks import near_names

HOW_TO_NAME = (
    "Name at least two submodules whose outputs are levels of the feature hierarchy, as in "
    "SFRWrapper(model, stages=['layer1', 'layer2', 'layer3']), or give a regular expression of their names; "
    "the names are those of model.named_modules()."
)


def find_stages(model: nn.Module, stages: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules that are to be stages, by name.

    Args:
        model: the plain model.
        stages: full names of submodules, or one regular expression that full names must match.

    Raises:
        ValueError: for an unknown or repeated name (listing the near ones), a bad expression, or fewer than two
            stages.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(stages, str):
        try:
            pattern = re.compile(stages)
        except re.error as error:
            raise ValueError(f"stages={stages!r} is not a regular expression: {error}") from error
        found = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        inside = [name for name in modules if re.fullmatch(rf".*\.(?:{stages})", name)] if len(found) < 2 else []
        if inside:
            more = ", ..." if len(inside) > 5 else ""
            raise ValueError(
                f"stages={stages!r} gives {len(found)} stage(s), two are needed. Full names are matched, and these end "
                f"so: {', '.join(inside[:5])}{more}; stages=r'.*\\.(?:{stages})' matches them"
            )
    else:
        everything = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        for name in stages:
            if name in everything and name not in modules:
                first = next(other for other, module in modules.items() if module is everything[name])
                raise ValueError(f"stage {name!r} is the same module as {first!r}; a shared module cannot be a stage")
            if name not in modules:
                near = near_names(name, modules, 5) or ", ".join(map(repr, list(modules)[:10]))
                raise ValueError(f"the model has no stage {name!r}; near names: {near}")
        repeated = [name for name, count in Counter(stages).items() if count > 1]
        if repeated:
            raise ValueError(f"stages must not be repeated; got {repeated} more than once")
        found = {name: modules[name] for name in stages}
    for name, module in found.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"stage {name!r} is a ScriptModule, which takes no hooks: name a module around it, or wrap the model "
                "before it is scripted"
            )
    if len(found) < 2:
        full = " A regular expression has to match full names." if isinstance(stages, str) else ""
        raise ValueError(f"stages={stages!r} gives {len(found)} stage(s), two are needed.{full} {HOW_TO_NAME}")
    return found
