"""Finds the stages of any nn.Module, and how their outputs are to be read, by watching one forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from sfr.config import SFRConfig
from sfr.nodes import Grid, View, cells, spatial_shape, token_grid
from sfr.outputs import features_in, logits_in
from sfr.stages import HOW_TO_NAME, infer_layout
from sfr.taps import graph_behind

# Stages of a model whose features are ordered by depth alone: more would make pairs of near copies.
STAGES_IN_DEPTH = 4
# Resolutions closer than this differ by the border of a convolution and are one level.
LEVEL_RATIO = 1.5
# A sequence that is longer than the map by more than this does not come from the map.
MOST_PREFIX_TOKENS = 16


@dataclass(eq=False)
class Sighting:
    """The output of one module in the watched forward.

    Args:
        name, module: the submodule.
        feature: its output.
        node: the autograd node that made it, if any; in-place operations later give the tensor another one.
        view: how the output is read.
        cells: local features in it.
        sole: whether the module returns no other feature; which of several is its output is for the user to say.
    """

    name: str
    module: nn.Module
    feature: Tensor
    node: Any
    view: View
    cells: int
    sole: bool

    @property
    def is_layer(self) -> bool:
        """Whether the module is a layer with weights."""
        return has_weights(self.module)

    @property
    def is_block(self) -> bool:
        """Whether the module has parts and is more than a container of them."""
        return not is_leaf(self.module) and not is_container(self.module)


def assumed_view(stage: nn.Module, feature: Tensor, config: SFRConfig) -> View:
    """Return how the output of a stage is read whose forward was not watched.

    Raises:
        ValueError: if the layout or the number of prefix tokens cannot be told.
    """
    layout = infer_layout(stage, feature) if config.layout == "auto" else config.layout
    if layout != "tokens":
        return View(layout)
    if config.prefix_tokens == "auto":
        raise ValueError(
            "gives tokens, and no watched forward has shown how many of them are class or register tokens: pass "
            "example_input= to the wrapper if its first forward is compiled, or state prefix_tokens= (0 if none)"
        )
    return View(layout, config.prefix_tokens)


class StageFinder:
    """Watches one forward of a model, as a context manager around it, and picks the stages.

    An output counts if it is one floating-point tensor, for the whole batch, of a module called once, that leads to
    the logits (as far as the autograd graph tells), before the classifier. Of these the stages are

    1. in a model most of whose layers lie in blocks of one type at one resolution (transformers, mixers): the outputs
       of those blocks, four evenly spaced in depth;
    2. else the last output at each resolution, down to the smallest;
    3. where these are fewer than two: of the blocks, or else the layers, four evenly spaced in depth.

    "Last" prefers the outermost modules, so that a block is taken and not a layer inside the next block (a strided
    block often begins at the old resolution), and a bare normalisation, pooling or dropout comes after all else.

    Args:
        model: the plain model.
        config: its ``layout`` and ``prefix_tokens`` overrule what is seen.
    """

    def __init__(self, model: nn.Module, config: SFRConfig) -> None:
        self._model = model
        self._seen: set[str] = set()
        self._kinds = Counter(type(module) for module in model.modules())
        self._reader = _Reader(config)
        self._sightings: list[Sighting] = []
        self._calls: Counter[str] = Counter()
        self._gradient = True
        self._batch: int | None = None
        self._logits: Tensor | None = None
        self._open = ExitStack()

    def __enter__(self) -> StageFinder:
        self._gradient = torch.is_grad_enabled()
        # Compiled parts of the model run eagerly meanwhile: the hooks are for this forward only.
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self._model.named_modules():
            if name:
                hooks.append(module.register_forward_hook(self._hook(name)))
        hooks.append(self._model.register_forward_hook(self._end))
        for hook in hooks:
            self._open.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
        self._batch = next((len(tensor) for tensor in tensors), None)

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, _: Any, output: Any) -> None:
            # Without the gradient of the rest, inside reentrant checkpointing, an output is no use as a feature.
            if torch.is_grad_enabled() != self._gradient:
                return
            self._calls[name] += 1
            features = features_in(output)
            if features and features[0].ndim and len(features[0]) == self._batch:
                feature, sole = features[0], len(features) == 1
                with suppress(ValueError):  # of no known layout: no candidate
                    view, size = self._reader.read(module, feature)
                    self._sightings.append(Sighting(name, module, feature, feature.grad_fn, view, size, sole))

        return see

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        self._logits = logits_in(output)

    def views(self, names: Iterable[str]) -> dict[str, View]:
        """Return how the output of each of these modules is read, as far as they were seen."""
        seen = {sighting.name: sighting.view for sighting in self._sightings}
        return {name: seen[name] for name in names if name in seen}

    def found(self) -> dict[str, Sighting]:
        """Return the stages by name, in forward order.

        Raises:
            ValueError: if there are fewer than two.
        """
        seen = _leading_to(self._logits, [sighting for sighting in self._sightings if sighting.sole])
        body = _before_classifier(self._logits, seen)
        self._seen = {sighting.name for sighting in body}
        layers = [sighting.name for sighting in seen if sighting.is_layer]
        blocks = self._blocks(self._stable(body), layers)
        ways = (
            lambda: evenly(blocks) if 2 * _held(blocks, layers) > len(layers) else [],
            lambda: self._resolutions(body),
            lambda: evenly(blocks),
            lambda: evenly(self._layers(body)),
            lambda: self._resolutions(seen),  # of a model that ends in its last stage
        )
        stages: list[Sighting] = []
        for way in ways:
            stages = way() or stages
            if len(stages) > 1:
                return {stage.name: stage for stage in stages}
        raise ValueError(
            f"found {len(stages)} stage(s) {[stage.name for stage in stages]} in {type(self._model).__name__}, "
            f"two are needed. {HOW_TO_NAME}"
        )

    def _stable(self, sightings: list[Sighting]) -> list[Sighting]:
        """Leave out what cannot be tapped (called more than once) or adds nothing (identities)."""
        return [
            sighting
            for sighting in sightings
            if self._calls[sighting.name] == 1 and not isinstance(sighting.module, nn.Identity)
        ]

    def _blocks(self, candidates: list[Sighting], layers: list[str]) -> list[Sighting]:
        """Return the blocks of the type that holds most layers; none if they work at several resolutions."""
        kinds: dict[type, list[Sighting]] = defaultdict(list)
        for sighting in candidates:
            if sighting.is_block:
                kinds[type(sighting.module)].append(sighting)
        repeated = [blocks for blocks in map(_outermost, kinds.values()) if len(blocks) > 1]
        # Of blocks around one another, which hold the same layers, the outer ones.
        blocks = max(repeated, key=lambda blocks: (_held(blocks, layers), -blocks[0].name.count(".")), default=[])
        return blocks if len({block.cells for block in blocks}) == 1 else []

    def _resolutions(self, sightings: list[Sighting]) -> list[Sighting]:
        """Return the last output at each resolution: the longest chain of them in which each is clearly smaller.

        A resolution counts if a layer with weights writes at it. The forward is followed down to the smallest one,
        so that of an encoder-decoder the encoder is taken, and detours to a smaller one within a module do not count.
        """
        written = {sighting.cells for sighting in sightings if sighting.is_layer}
        sizes = {sighting.name: sighting.cells for sighting in sightings}
        maps = [
            sighting
            for sighting in self._stable(sightings)
            if sighting.cells > 1 and sighting.cells in written and not _is_detour(sighting, sizes)
        ]
        if not maps:
            return []
        smallest = min(sighting.cells for sighting in maps)
        bottom = max(index for index, sighting in enumerate(maps) if sighting.cells == smallest)
        levels = self._last(maps[: bottom + 1], lambda sighting: sighting.cells)
        # Attention maps and other large maps on the way would cut the hierarchy short; they are in no longest chain.
        chains: list[list[Sighting]] = []
        for level in levels:
            before = [chain for chain in reversed(chains) if chain[-1].cells > LEVEL_RATIO * level.cells]
            longest = max(before, key=lambda chain: (len(chain), -self._depth(chain[-1])[0]), default=[])
            chains.append([*longest, level])
        return max(reversed(chains), key=len)

    def _layers(self, sightings: list[Sighting]) -> list[Sighting]:
        """Return the last output before each next layer."""
        level, levels = 0, {}
        for sighting in sightings:
            level += sighting.is_layer
            levels[sighting] = level
        return self._last([sighting for sighting in self._stable(sightings) if levels[sighting]], levels.__getitem__)

    def _last(self, candidates: list[Sighting], key: Callable[[Sighting], int]) -> list[Sighting]:
        """Return the last output of the outermost module for each key, in forward order."""
        best: dict[int, Sighting] = {}
        for sighting in candidates:
            level = key(sighting)
            if level not in best or self._depth(sighting) <= self._depth(best[level]):
                best[level] = sighting
        return [sighting for sighting in candidates if best[key(sighting)] is sighting]

    def _depth(self, sighting: Sighting) -> tuple[int, bool]:
        """How many blocks a module lies in.

        A container is no block, nor is a module of a kind that is there once, or one that could be no stage itself.
        """
        around = (self._model.get_submodule(name) for name in _ancestors(sighting.name) if name in self._seen)
        depth = sum(not is_container(module) and self._kinds[type(module)] > 1 for module in around)
        kind = type(sighting.module).__name__.lower()
        return depth, is_leaf(sighting.module) and any(word in kind for word in ("norm", "pool", "dropout", "permute"))


class _Reader:
    """Tells how one output after another is read, from the layers and maps that went before."""

    def __init__(self, config: SFRConfig) -> None:
        self._config = config
        self._layer: nn.Module | None = None
        self._maps: list[Grid] = []
        self._prefix = 0

    def read(self, module: nn.Module, feature: Tensor) -> tuple[View, int]:
        """Return the view of a module's output and the number of local features in it.

        Raises:
            ValueError: if the output has not the axes of a feature.
        """
        is_layer = has_weights(module)
        if is_layer:
            self._layer = module
        layout = self._config.layout
        if layout == "auto":
            layout = infer_layout(module, feature, self._layer)
        shape = spatial_shape(feature, layout)
        view = self._tokens(*shape) if layout == "tokens" else View(layout)
        local = cells(shape) - view.prefix
        if is_layer and local > 1:
            self._maps.append((local,) if layout == "tokens" else shape)
        return view, local

    def _tokens(self, count: int) -> View:
        """Return the view of `count` tokens.

        Those beyond the cells of a map, or beyond the length of a sequence, written before are prefix tokens. Where
        none fits (tokens were merged) there are as many as before. The rest lies like a map of the same proportions.
        """
        surplus = [extra for extra in (count - cells(grid) for grid in self._maps) if 0 <= extra <= MOST_PREFIX_TOKENS]
        if self._config.prefix_tokens != "auto":
            self._prefix = self._config.prefix_tokens
        elif surplus:
            self._prefix = min(surplus)
        local = count - self._prefix
        nearest = sorted(self._maps, key=lambda grid: abs(cells(grid) - local))
        fitting = (grid for grid in nearest if local > 0 and len(token_grid(local, grid)) > 1)
        return View("tokens", self._prefix, next(fitting, ()))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no parts."""
    return not any(True for _ in module.children())


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a layer: a convolution, a linear map, or a leaf with a matrix of its own."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return True
    return is_leaf(module) and any(parameter.ndim > 1 for parameter in module.parameters())


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others."""
    return type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def evenly(stages: list[Sighting]) -> list[Sighting]:
    """Return at most :data:`STAGES_IN_DEPTH` of the stages, evenly spaced, with the last one."""
    count = min(STAGES_IN_DEPTH, len(stages))
    return [stages[(k + 1) * len(stages) // count - 1] for k in range(count)]


def _leading_to(logits: Tensor | None, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out what the logits do not depend on: side branches and auxiliary classifiers."""
    if logits is None or logits.grad_fn is None:
        return sightings
    reached = set(graph_behind(logits))
    return [sighting for sighting in sightings if sighting.node is None or sighting.node in reached]


def _before_classifier(logits: Tensor | None, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out the classifier, which is the last layer if it is as wide as the logits, and all that ends after it."""
    if logits is None or logits.ndim < 2:
        return sightings
    last = max((index for index, sighting in enumerate(sightings) if sighting.is_layer), default=None)
    if last is None or logits.shape[1] not in sightings[last].feature.shape[1:]:
        return sightings
    return sightings[:last]


def _ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold this one, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _outermost(blocks: list[Sighting]) -> list[Sighting]:
    """Leave out the blocks inside others."""
    names = {block.name for block in blocks}
    return [block for block in blocks if not any(name in names for name in _ancestors(block.name))]


def _held(blocks: list[Sighting], layers: list[str]) -> int:
    """Return how many of the layers, given by name, lie inside the blocks."""
    names = {block.name for block in blocks}
    return sum(any(name in names for name in _ancestors(layer)) for layer in layers)


def _is_detour(sighting: Sighting, sizes: Mapping[str, int]) -> bool:
    """Whether a module around this one returns to a larger map, as attention to a pooled map does."""
    return any(sizes.get(name, 0) > sighting.cells for name in _ancestors(sighting.name))
