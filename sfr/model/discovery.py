"""Finds the stages of any nn.Module, and how their outputs are to be read, by watching one forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from sfr.model.candidates import LEVEL_RATIO, Candidates
from sfr.model.formats import View
from sfr.model.outputs import features_in, logits_in
from sfr.model.reading import Reader, assumed_view
from sfr.model.recorder import graph_behind
from sfr.model.settings import StageSettings
from sfr.model.sightings import STAGES_IN_DEPTH, Sighting, ancestors, even_places, held, is_container, outermost
from sfr.model.stages import HOW_TO_NAME

__all__ = ["STAGES_IN_DEPTH", "Sighting", "StageFinder", "assumed_view", "evenly"]


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

    It holds on to the outputs that may still become stages, see :class:`sfr.model.candidates.Candidates`, and
    of all others to no more than their shapes and places in the autograd graph.

    Args:
        model: the plain model.
        settings: its ``layout`` and ``prefix_tokens`` overrule what is seen.
        named: names of the stages, if the user gave them; none is looked for then.
        keep: whether the features of the stages are wanted, too.
    """

    def __init__(
        self, model: nn.Module, settings: StageSettings, named: Sequence[str] = (), keep: bool = False
    ) -> None:
        self._model, self._settings, self._named = model, settings, tuple(named)
        self._seen: set[str] = set()
        self._kinds = Counter(type(module) for module in model.modules())
        self._sightings: list[Sighting] = []
        self._calls: Counter[str] = Counter()
        self._candidates = Candidates(model) if keep and not named else None
        self._reader = Reader(settings, ())
        self._gradient = True
        self._batch: int | None = None
        self._nested = 0
        self._logits: Tensor | None = None
        self._open = ExitStack()

    def __enter__(self) -> StageFinder:
        self._gradient = torch.is_grad_enabled()
        # Compiled parts of the model run eagerly meanwhile: the hooks are for this forward only.
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self._model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.append(module.register_forward_hook(self._hook(name)))
        hooks.append(self._model.register_forward_hook(self._end))
        for hook in hooks:
            self._open.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._nested += 1
        if self._nested > 1:  # the model calls itself
            return
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
        self._batch = next((len(tensor) for tensor in tensors), None)
        self._reader = self._reader_of(self._batch)

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, _: Any, output: Any) -> None:
            # Without the gradient of the rest, inside reentrant checkpointing, an output is no use as a feature.
            if torch.is_grad_enabled() != self._gradient:
                return
            self._calls[name] += 1
            features = features_in(output)
            if features and features[0].ndim:
                self._note(name, module, features[0], sole=len(features) == 1)
            elif self._candidates:
                self._candidates.leave_out(name)

        return see

    def _note(self, name: str, module: nn.Module, feature: Tensor, sole: bool) -> None:
        sighting = Sighting(name, module, tuple(feature.shape), feature.grad_fn, sole)
        self._sightings.append(sighting)
        if self._candidates:
            sighting.output = TensorWeakRef(feature)
            self._reader.read(sighting)
            self._candidates.add(sighting, feature)

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        """Read all that was seen once more, now that the batch of the logits is known."""
        self._nested -= 1
        if self._nested:
            return
        self._logits = logits_in(output)
        batch = len(self._logits) if self._logits is not None and self._logits.ndim > 1 else None
        reader = self._reader_of(batch, self._batch)
        for sighting in self._sightings:
            reader.read(sighting)

    def _reader_of(self, *batches: int | None) -> Reader:
        known = dict.fromkeys(batch for batch in batches if batch is not None)
        return Reader(self._settings, known, self._sightings, self._named)

    @property
    def called(self) -> Collection[str]:
        """Names of the modules that were called."""
        return self._calls.keys()

    def views(self, names: Iterable[str]) -> dict[str, View]:
        """Return how the output of each of these modules is read, as far as they were seen.

        Raises:
            ValueError: naming the stage, if it cannot be told which of its axes is the batch.
        """
        wanted = set(names)
        seen = {sighting.name: sighting for sighting in self._sightings if sighting.name in wanted}
        for name, sighting in seen.items():
            if sighting.problem:
                raise ValueError(f"stage {name!r} {sighting.problem}")
        return {name: sighting.view for name, sighting in seen.items() if sighting.view}

    def found(self) -> dict[str, Sighting]:
        """Return the stages by name, in forward order.

        Raises:
            ValueError: if there are fewer than two, or one cannot be read.
        """
        seen, body = self._seen_and_body()
        self._seen = {sighting.name for sighting in body}
        layers = [sighting.name for sighting in seen if sighting.is_layer]
        blocks = self._blocks(self._stable(body), layers)
        ways = (
            lambda: evenly(blocks) if 2 * held(_names(blocks), layers) > len(layers) else [],
            lambda: self._resolutions(body),
            lambda: evenly(blocks),
            lambda: evenly(self._layers(body)),
            lambda: self._resolutions(seen),  # of a model that ends in its last stage
        )
        stages: list[Sighting] = []
        for way in ways:
            stages = way() or stages
            if len(stages) > 1:
                self.views(stage.name for stage in stages)
                return {stage.name: stage for stage in stages}
        raise ValueError(
            f"found {len(stages)} stage(s) {[stage.name for stage in stages]} in {type(self._model).__name__}, "
            f"two are needed{self._why_few()}. {HOW_TO_NAME}"
        )

    def _seen_and_body(self) -> tuple[list[Sighting], list[Sighting]]:
        """Return the outputs that lead to the logits, and of these the ones before the classifier.

        Where a loss takes the place of the logits, or one number for each image, the last layer is the classifier: of
        several heads, as detectors have at each resolution, the other ones and what is for them alone count as side
        branches.
        """
        logits = self._logits
        leading = _leading_to(None if logits is None else logits.grad_fn, self._sightings)
        seen = [sighting for sighting in leading if sighting.sole and sighting.view]
        if logits is None or logits.ndim > 1:
            return seen, _before_classifier(logits, seen)
        layers = [sighting for sighting in leading if sighting.is_layer]
        if not layers:
            return seen, seen
        before = set(leading[: leading.index(layers[-1])])
        seen = _leading_to(layers[-1].node, seen)
        return seen, [sighting for sighting in seen if sighting in before]

    def _why_few(self) -> str:
        """Return what is known of the outputs that are no stages, as the rest of a sentence."""
        unread = [sighting for sighting in self._sightings if sighting.problem]
        if unread:
            stated = "" if self._settings.layout == "auto" else f" with layout={self._settings.layout!r}"
            return f": {len(unread)} output(s) cannot be read{stated}; {unread[0].name!r}: {unread[0].problem}"
        others = [sighting for sighting in self._sightings if sighting.view is None]
        if self._sightings and len(others) == len(self._sightings):
            name, shape = others[0].name, others[0].shape
            return f": no output has the batch, {self._batch}, as its first axis: {name!r} has shape {shape}"
        repeated = [name for name, count in self._calls.items() if count > 1]
        if repeated:
            return (
                f": {len(repeated)} module(s) ran more than once in the forward, as {repeated[0]!r}, and a stage has "
                "to run once. A model that calls one encoder for several inputs can call it once, on torch.cat([a, b])"
            )
        left_out = self.left_out()
        return f": left out: {', '.join(left_out)}" if left_out else ""

    def left_out(self) -> tuple[str, ...]:
        """Return, of a net whose last stage is no stage here because its map has a single cell, what to say of it.

        What comes after a pooling to one cell was never meant to be a map.
        """
        maps = [sighting for sighting in self._sightings if sighting.view and sighting.sole and sighting.ndim > 3]
        last = max((place for place, sighting in enumerate(maps) if sighting.cells > 1), default=-1)
        single = maps[last + 1 :]
        if self._named or not single or _takes_a_pooled_map(single[0].module):
            return ()
        layers = [sighting for sighting in self._stable(single) if any(True for _ in sighting.module.parameters())]
        names = [sighting.name for sighting in self._last(layers, lambda sighting: sighting.cells)]
        return tuple(
            f"{name} ({' x '.join('1' * (single[0].ndim - 2))}), whose map has a single cell" for name in names
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
        rank = lambda blocks: (held(_names(blocks), layers), -blocks[0].name.count("."))  # noqa: E731
        blocks = max(repeated, key=rank, default=[])
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
        around = (self._model.get_submodule(name) for name in ancestors(sighting.name) if name in self._seen)
        depth = sum(not is_container(module) and self._kinds[type(module)] > 1 for module in around)
        return depth, sighting.is_bare


def evenly(stages: list[Sighting]) -> list[Sighting]:
    """Return at most :data:`~sfr.model.sightings.STAGES_IN_DEPTH` of the stages, evenly spaced, with the last one."""
    return [stages[place] for place in even_places(len(stages))] if stages else []


def _leading_to(node: Any, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out what a node of the graph does not depend on: side branches and auxiliary classifiers."""
    if node is None:
        return sightings
    reached = set(graph_behind(node))
    return [sighting for sighting in sightings if sighting.node is None or sighting.node in reached]


def _before_classifier(logits: Tensor | None, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out the classifier, which is the last layer if it is as wide as the logits, and all that ends after it."""
    last = max((index for index, sighting in enumerate(sightings) if sighting.is_layer), default=None)
    if logits is None or last is None or logits.shape[1] not in sightings[last].shape[1:]:
        return sightings
    return sightings[:last]


def _is_detour(sighting: Sighting, sizes: Mapping[str, int]) -> bool:
    """Whether a module around this one returns to a larger map, as attention to a pooled map does."""
    return any(sizes.get(name, 0) > sighting.cells for name in ancestors(sighting.name))


def _takes_a_pooled_map(module: nn.Module) -> bool:
    """Whether a module that returns a map of one cell pools it, or convolves one that was pooled."""
    pointwise = isinstance(module, _ConvNd) and {*module.kernel_size, *module.stride} == {1}
    return pointwise or "pool" in type(module).__name__.lower()


def _names(sightings: list[Sighting]) -> list[str]:
    return [sighting.name for sighting in sightings]


def _outermost(blocks: list[Sighting]) -> list[Sighting]:
    """Leave out the blocks inside others."""
    names = set(outermost(_names(blocks)))
    return [block for block in blocks if block.name in names]
