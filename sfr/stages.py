"""Finds the stages of any nn.Module: by name, by regular expression, or by watching one forward."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from sfr.config import Layout, Pairs

HOW_TO_NAME = (
    "Name at least two submodules whose outputs are levels of the feature hierarchy, as in "
    "SFRWrapper(model, stages=['layer1', 'layer2', 'layer3']), or give a regular expression of their names; "
    "the names are those of model.named_modules()."
)


def find_stages(model: nn.Module, stages: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules called for, by name.

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
            raise ValueError(f"stages={stages!r} is no regular expression: {error}") from error
        found = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
    else:
        for name in stages:
            if name not in modules:
                near = difflib.get_close_matches(str(name), modules, n=5, cutoff=0.5) or list(modules)[:10]
                raise ValueError(f"the model has no stage {name!r}; near names: {', '.join(near)}")
        repeated = [name for name, count in Counter(stages).items() if count > 1]
        if repeated:
            raise ValueError(f"stages must not be repeated; got {repeated} more than once")
        found = {name: modules[name] for name in stages}
    if len(found) < 2:
        raise ValueError(f"stages={stages!r} gives {len(found)} stage(s), two are needed. {HOW_TO_NAME}")
    return found


@dataclass
class _Sighting:
    """One output seen while a forward is watched."""

    name: str
    module: nn.Module
    output: Any


class StageFinder:
    """Watches one forward of a convolutional model and picks the last output at each spatial resolution.

    A resolution counts if it has more than one location and a convolution writes at it. Of its outputs those of the
    outermost modules are preferred, so that a block is taken and not a layer inside the next block (a strided block
    often begins at the old resolution), and a bare normalisation or pooling comes after everything else. Seen from
    the deepest stage backwards each shallower one must be larger, which leaves out side branches.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sightings: list[_Sighting] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> StageFinder:
        self._gradient = torch.is_grad_enabled()
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, _: Any, output: Any) -> None:
            # Without the gradient of the rest, inside reentrant checkpointing, an output is no use as a feature.
            if torch.is_grad_enabled() == self._gradient:
                self._sightings.append(_Sighting(name, module, output))

        return see

    def found(self) -> dict[str, tuple[nn.Module, Tensor]]:
        """Return module and output of each stage by name, in forward order; forgets what it saw.

        Raises:
            ValueError: if there are fewer than two.
        """
        sightings, self._sightings = self._sightings, []
        calls = Counter(seen.name for seen in sightings)
        maps = [seen for seen in sightings if _is_map(seen.output)]
        written = {_resolution(seen) for seen in maps if isinstance(seen.module, _ConvNd)}
        best: dict[tuple[int, ...], _Sighting] = {}
        for seen in maps:
            resolution = _resolution(seen)
            eligible = resolution in written and calls[seen.name] == 1 and not isinstance(seen.module, nn.Identity)
            if eligible and (resolution not in best or self._depth(seen) <= self._depth(best[resolution])):
                best[resolution] = seen
        order = {id(seen): position for position, seen in enumerate(maps)}
        stages: list[_Sighting] = []
        for seen in sorted(best.values(), key=lambda seen: order[id(seen)], reverse=True):
            if not stages or _cells(seen) > _cells(stages[-1]):
                stages.append(seen)
        if len(stages) < 2:
            names = [seen.name for seen in stages]
            raise ValueError(
                f"found {len(stages)} stage(s) {names} in {type(self._model).__name__}, two are needed. {HOW_TO_NAME}"
            )
        return {seen.name: (seen.module, seen.output) for seen in reversed(stages)}

    def _depth(self, seen: _Sighting) -> tuple[int, bool]:
        """How far inside blocks a module lies, smaller is further out; plain containers are not blocks."""
        parts = seen.name.split(".")
        ancestors = (self._model.get_submodule(".".join(parts[:k])) for k in range(1, len(parts)))
        depth = sum(type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict) for module in ancestors)
        is_leaf = not any(True for _ in seen.module.children())
        kind = type(seen.module).__name__.lower()
        return depth, is_leaf and ("norm" in kind or "pool" in kind)


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim >= 3 and math.prod(output.shape[2:]) > 1


def _resolution(seen: _Sighting) -> tuple[int, ...]:
    return tuple(seen.output.shape[2:])


def _cells(seen: _Sighting) -> int:
    return math.prod(_resolution(seen))


def infer_layout(stage: nn.Module, feature: Tensor) -> Layout:
    """Return the layout of a stage's output, from its number of axes and the kind of the stage's last layer.

    Two axes are a vector. A stage that ends in a convolution, or has none of the layers that work on the last axis
    (Linear, LayerNorm), gives channels first; any other gives tokens (three axes) or channels last.

    Raises:
        ValueError: if the shape is no known layout.
    """
    if feature.ndim == 2:
        return "vector"
    if not 3 <= feature.ndim <= 5:
        raise ValueError(f"has shape {tuple(feature.shape)}, which is no known layout; state layout=...")
    convolutional = any(isinstance(module, _ConvNd) for module in stage.modules())
    last_axis = any(isinstance(module, (nn.Linear, nn.LayerNorm)) for module in stage.modules())
    if convolutional or (feature.ndim > 3 and not last_axis):
        return "channels_first"
    return "tokens" if feature.ndim == 3 else "channels_last"


def resolve_pairs(pairs: Pairs | Sequence[tuple[int | str, int | str]], names: Sequence[str]) -> list[tuple[int, int]]:
    """Return (shallow, deep) index pairs into `names`, the stages in forward order.

    Raises:
        ValueError: for an unknown stage, or a pair whose deep stage does not come after the shallow one.
    """
    count = len(names)
    if pairs == "all":
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    if pairs == "last":
        return [(i, count - 1) for i in range(count - 1)]
    if pairs == "adjacent":
        return [(i, i + 1) for i in range(count - 1)]
    resolved = []
    for shallow, deep in pairs:
        i, j = _stage_index(shallow, names), _stage_index(deep, names)
        if i >= j:
            raise ValueError(
                f"pairs: the deep stage must come after the shallow one; got {(shallow, deep)!r}, "
                f"the forward order is {', '.join(names)}"
            )
        resolved.append((i, j))
    return resolved


def _stage_index(stage: int | str, names: Sequence[str]) -> int:
    if isinstance(stage, str):
        if stage not in names:
            raise ValueError(f"pairs: there is no stage {stage!r}; the stages are {', '.join(names)}")
        return names.index(stage)
    if not -len(names) <= stage < len(names):
        raise ValueError(f"pairs: stage index {stage} is out of range; there are {len(names)} stages")
    return stage % len(names)
