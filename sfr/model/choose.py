"""The rule of the stages: from what a forward has shown to the outputs that are levels of the feature hierarchy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sfr.model.graph import graph_behind, on_other_branches
from sfr.model.kinds import ancestors, held, is_container, outermost
from sfr.model.reasons import why_apart, why_few
from sfr.model.sharded import check_whole
from sfr.model.stages import HOW_TO_NAME
from sfr.model.trace import Sighting, Trace

# Stages of a model whose features are ordered by depth alone: more would make pairs of near copies.
STAGES_IN_DEPTH = 4

# Resolutions closer than this differ by the border of a convolution and are one level.
LEVEL_RATIO = 1.5


def choose(trace: Trace) -> dict[str, Sighting]:
    """Return the stages by name, in forward order.

    Candidates are outputs before the classifier that are one floating-point tensor for the whole batch, of a module
    called once, and that lead to the logits as far as the autograd graph shows. Of an output without names it is not
    known which part the logits are: the first tensor and the last one are tried, and more stages are better. They are

    1. in a model most of whose layers lie in blocks of one type at one resolution, one behind another (transformers,
       mixers): the outputs of those blocks, four evenly spaced in depth;
    2. else the last output at each resolution, down to the smallest;
    3. if that gives fewer than two: four blocks or, without blocks, four layers, evenly spaced in depth.

    "Last" prefers the outermost module: a block instead of a layer inside the next block (a strided block often begins
    at the old resolution). A bare normalisation, pooling or dropout is taken only if there is nothing else.

    Args:
        trace: the watched forward.

    Raises:
        ValueError: if there are fewer than two stages, or what they return may be a part of the channels.
    """
    stages, apart = _stages(trace)
    if trace.last_node not in (None, trace.logits_node):
        deepest, _ = _stages(replace(trace, logits_shape=trace.last_shape, logits_node=trace.last_node))
        stages = max(stages, deepest, key=len)
    if len(stages) < 2:
        raise ValueError(
            f"found {len(stages)} stage(s) {_names(stages)} in {trace.model}, two are needed"
            f"{why_apart(_names(apart)) or why_few(trace, single_cells(trace))}. {HOW_TO_NAME}"
        )
    check_whole(stages, trace.sharded)
    return {stage.name: stage for stage in stages}


def _stages(trace: Trace) -> tuple[list[Sighting], list[Sighting]]:
    """Return the stages by the first rule that gives two of them, and what was left out because it lies side by side.

    If no rule gives two, the first are what the last rule with any gave.
    """
    seen, body = _seen_and_body(trace)
    depth = _Depth(trace, body)
    layers = [sighting.name for sighting in seen if sighting.is_layer]
    blocks = _blocks(_stable(trace, body), layers)
    rules: tuple[Callable[[], list[Sighting]], ...] = (
        lambda: evenly(blocks) if 2 * held(_names(blocks), layers) > len(layers) else [],
        lambda: _resolutions(trace, body, depth),
        lambda: evenly(blocks),
        lambda: evenly(_layers(trace, body, depth)),
        lambda: _resolutions(trace, seen, depth),  # of a model that ends in its last stage
    )
    stages: list[Sighting] = []
    apart: list[Sighting] = []
    for rule in rules:
        found = rule()
        if _are_side_by_side(found):
            apart = apart or found
            found = found[-1:]
        stages = found or stages
        if len(stages) > 1:
            break
    return stages, apart


def _are_side_by_side(stages: list[Sighting]) -> bool:
    """Whether none was computed from another, as far as the graph shows, as the members of an ensemble are not."""
    apart = on_other_branches({stage.name: stage.node for stage in stages})
    return len(stages) > 1 and len(apart) == len(stages) * (len(stages) - 1) // 2


def evenly(stages: list[Sighting]) -> list[Sighting]:
    """Return at most :data:`STAGES_IN_DEPTH` of the stages, evenly spaced, with the last one."""
    return [stages[place] for place in even_places(len(stages))] if stages else []


def even_places(count: int) -> list[int]:
    """Return the places of at most :data:`STAGES_IN_DEPTH` of `count` outputs, evenly spaced, with the last one."""
    stages = min(STAGES_IN_DEPTH, count)
    return [(k + 1) * count // stages - 1 for k in range(stages)]


def single_cells(trace: Trace) -> tuple[str, ...]:
    """Return a note for each stage that is left out because its map has a single cell at this input size.

    Outputs after a pooling to one cell get no note: they were never meant to be maps.
    """
    maps = [sighting for sighting in trace.sightings if sighting.view and sighting.sole and sighting.ndim > 3]
    last = max((place for place, sighting in enumerate(maps) if sighting.cells > 1), default=-1)
    single = maps[last + 1 :]
    if not single or _takes_a_pooled_map(single[0].module):
        return ()
    layers = [sighting for sighting in _stable(trace, single) if any(True for _ in sighting.module.parameters())]
    depth = _Depth(trace, _seen_and_body(trace)[1])
    names = _names(_last(layers, lambda sighting: sighting.cells, depth))
    size = " x ".join("1" * (single[0].ndim - 2))
    return tuple(f"{name} ({size}), whose map has a single cell" for name in names)


class _Depth:
    """How many blocks a module lies in: the fewer, the more it is a stage.

    Containers are not blocks, nor are modules whose type occurs once, or that could not be a stage themselves.
    """

    def __init__(self, trace: Trace, body: list[Sighting]) -> None:
        self._blocks = {
            sighting.name
            for sighting in body
            if not is_container(sighting.module) and trace.counts[type(sighting.module)] > 1
        }

    def __call__(self, sighting: Sighting) -> tuple[int, bool]:
        return sum(name in self._blocks for name in ancestors(sighting.name)), sighting.is_bare


def _seen_and_body(trace: Trace) -> tuple[list[Sighting], list[Sighting]]:
    """Return the outputs that lead to the logits, and of these the ones before the classifier.

    If the model returns a loss, or one number for each image, instead of logits, the last layer counts as the
    classifier. Other heads, which detectors have at each resolution, and the layers that only feed them are side
    branches.
    """
    leading = _leading_to(trace.logits_node, trace.sightings)
    seen = [sighting for sighting in leading if sighting.sole and sighting.view]
    if trace.logits_shape is None or len(trace.logits_shape) > 1:
        return seen, _before_classifier(trace.logits_shape, seen)
    layers = [sighting for sighting in leading if sighting.is_layer]
    if not layers:
        return seen, seen
    before = set(leading[: leading.index(layers[-1])])
    seen = _leading_to(layers[-1].node, seen)
    return seen, [sighting for sighting in seen if sighting in before]


def _leading_to(node: object, sightings: Collection[Sighting]) -> list[Sighting]:
    """Leave out what a node of the graph does not depend on: side branches and auxiliary classifiers."""
    if node is None:
        return list(sightings)
    reached = set(graph_behind(node))
    return [sighting for sighting in sightings if sighting.node is None or sighting.node in reached]


def _before_classifier(logits_shape: tuple[int, ...] | None, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out the classifier, which is the last layer if it is as wide as the logits, and all that ends after it."""
    last = max((index for index, sighting in enumerate(sightings) if sighting.is_layer), default=None)
    if logits_shape is None or last is None or logits_shape[1] not in sightings[last].shape[1:]:
        return sightings
    return sightings[:last]


def _stable(trace: Trace, sightings: list[Sighting]) -> list[Sighting]:
    """Leave out what cannot be tapped (called more than once) or adds nothing (identities)."""
    return [
        sighting
        for sighting in sightings
        if trace.calls[sighting.name] == 1 and not isinstance(sighting.module, nn.Identity)
    ]


def _blocks(candidates: list[Sighting], layers: list[str]) -> list[Sighting]:
    """Return the blocks of the type that holds most layers; none if they work at several resolutions."""
    of_a_type: dict[type, list[Sighting]] = defaultdict(list)
    for sighting in candidates:
        if sighting.is_block:
            of_a_type[type(sighting.module)].append(sighting)
    repeated = [blocks for blocks in map(_outermost, of_a_type.values()) if len(blocks) > 1]
    # Of blocks around one another, which hold the same layers, the outer ones.
    rank = lambda blocks: (held(_names(blocks), layers), -blocks[0].name.count("."))  # noqa: E731
    blocks = max(repeated, key=rank, default=[])
    return blocks if len({block.cells for block in blocks}) == 1 else []


def _outermost(blocks: list[Sighting]) -> list[Sighting]:
    """Leave out the blocks inside others."""
    names = set(outermost(_names(blocks)))
    return [block for block in blocks if block.name in names]


def _resolutions(trace: Trace, sightings: list[Sighting], depth: _Depth) -> list[Sighting]:
    """Return the last output at each resolution: the longest chain of them in which each is clearly smaller.

    A resolution counts if a layer with weights writes at it. The forward is followed down to the smallest one, so that
    of an encoder-decoder the encoder is taken, and detours to a smaller one within a module do not count.
    """
    written = {sighting.cells for sighting in sightings if sighting.is_layer}
    sizes = {sighting.name: sighting.cells for sighting in sightings}
    maps = [
        sighting
        for sighting in _stable(trace, sightings)
        if sighting.cells > 1 and sighting.cells in written and not _is_detour(sighting, sizes)
    ]
    if not maps:
        return []
    smallest = min(sighting.cells for sighting in maps)
    bottom = max(index for index, sighting in enumerate(maps) if sighting.cells == smallest)
    levels = _last(maps[: bottom + 1], lambda sighting: sighting.cells, depth)
    # Attention maps and other large maps on the way would cut the hierarchy short; they are in no longest chain.
    chains: list[list[Sighting]] = []
    for level in levels:
        before = [chain for chain in reversed(chains) if chain[-1].cells > LEVEL_RATIO * level.cells]
        longest = max(before, key=lambda chain: (len(chain), -depth(chain[-1])[0]), default=[])
        chains.append([*longest, level])
    return max(reversed(chains), key=len)


def _is_detour(sighting: Sighting, sizes: Mapping[str, int]) -> bool:
    """Whether a module around this one returns to a larger map, as attention to a pooled map does."""
    return any(sizes.get(name, 0) > sighting.cells for name in ancestors(sighting.name))


def _layers(trace: Trace, sightings: list[Sighting], depth: _Depth) -> list[Sighting]:
    """Return the last output before each next layer."""
    level, levels = 0, {}
    for sighting in sightings:
        level += sighting.is_layer
        levels[sighting] = level
    return _last([sighting for sighting in _stable(trace, sightings) if levels[sighting]], levels.__getitem__, depth)


def _last(candidates: list[Sighting], key: Callable[[Sighting], int], depth: _Depth) -> list[Sighting]:
    """Return the last output of the outermost module for each key, in forward order."""
    best: dict[int, Sighting] = {}
    for sighting in candidates:
        level = key(sighting)
        if level not in best or depth(sighting) <= depth(best[level]):
            best[level] = sighting
    return [sighting for sighting in candidates if best[key(sighting)] is sighting]


def _takes_a_pooled_map(module: nn.Module) -> bool:
    """Whether a module that returns a map of one cell pools it, or convolves one that was pooled."""
    pointwise = isinstance(module, _ConvNd) and {*module.kernel_size, *module.stride} == {1}
    return pointwise or "pool" in type(module).__name__.lower()


def _names(sightings: list[Sighting]) -> list[str]:
    return [sighting.name for sighting in sightings]
