"""Which outputs of a watched forward can still become stages; the others are released as it proceeds."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from sfr.model.choose import LEVEL_RATIO, even_places
from sfr.model.kinds import ancestors, has_weights, held, is_block, is_container, is_leaf, outermost
from sfr.model.trace import Sighting

KEEPING_THE_SHAPE = (_NormBase, nn.LayerNorm, nn.GroupNorm, _DropoutNd)


class Candidates:
    """Keeps alive the outputs that may become stages, about as many as there will be.

    It foresees what :func:`sfr.model.choose.choose` will choose: the last output at each resolution so far, and the
    blocks, or else layers, that lie at even spaces in depth if the forward calls all there are in the model. If it
    foresees wrongly, a stage lacks its feature in the watched forward, unless the autograd graph keeps it anyway.

    Args:
        model: the plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = names = {name: module for name, module in model.named_modules() if name}
        kinds = Counter(type(module) for module in model.modules())
        self._nests = {name for name, module in names.items() if not is_container(module) and kinds[type(module)] > 1}
        self._shared = _with_several_names(model)
        self._kinds_seen: set[type] = set()
        self._activated, self._repeated = _layers_soon_replaced(model)
        self._ended: dict[str, Sighting | None] = {}
        self._kept: dict[Sighting, Tensor] = {}
        self._time: dict[Sighting, int] = {}
        self._levels: dict[int, list[Sighting]] = defaultdict(list)
        self._smallest: Sighting | None = None
        self._written: list[int] = []
        self._blocks = _Blocks(names)
        layers = [name for name, module in names.items() if has_weights(module)]
        self._classifier, self._classified = layers[-1] if layers else "", float("inf")
        self._depths = {place + 1 for place in even_places(max(len(layers) - 1, 1))}
        self._strided = _has_strides(names.values())
        self._depth = 0
        self._layers: dict[int, list[Sighting]] = defaultdict(list)

    def add(self, sighting: Sighting, feature: Tensor) -> None:
        """Take note of an output; keep it, and let go of others that can no longer become stages because of it."""
        if sighting.view is None or not sighting.sole or sighting.name in self._ended:
            self.leave_out(sighting.name)
            return
        self._ended[sighting.name] = sighting
        self._kinds_seen.add(type(sighting.module))
        self._time[sighting] = time = len(self._time)
        if sighting.name == self._classifier:
            self._classified = time
        self._blocks.add(sighting)
        if not isinstance(sighting.module, nn.Identity):
            self._add_to_levels(sighting)
        if sighting.is_layer:
            self._depth += 1
        if not self._depth_is_enough() and self._depth in self._depths:
            self._layers[self._depth] = self._not_beaten([*self._layers[self._depth], sighting])
        self._kept[sighting] = feature
        self._let_go()

    def leave_out(self, name: str) -> None:
        """Take note of a module whose output cannot become a stage, or that is called again."""
        before, self._ended[name] = self._ended.get(name), None
        if before is not None:
            self._blocks.leave_out(before)
            for group in (*self._levels.values(), *self._layers.values()):
                if before in group:
                    group.remove(before)
            self._let_go()

    def _add_to_levels(self, sighting: Sighting) -> None:
        if sighting.cells > 1:
            if not self._open(ancestors(sighting.name)):
                smallest = self._smallest.cells if self._smallest else sighting.cells
                self._smallest = sighting if sighting.cells <= smallest else self._smallest
                if sighting.is_layer:
                    self._written.append(sighting.cells)
            self._levels[sighting.cells].append(sighting)
        for level, group in self._levels.items():
            self._levels[level] = self._not_beaten([each for each in group if not self._is_detour(each)], level=True)

    def _let_go(self) -> None:
        depths = [] if self._depth_is_enough() else self._layers.values()
        soon = self._activated | self._repeated
        wanted = {each for group in self._levels.values() for each in group if not self._goes(each, soon)}
        wanted |= {each for group in depths for each in group if not self._goes(each, self._activated)}
        wanted |= self._blocks.wanted()
        self._kept = {sighting: feature for sighting, feature in self._kept.items() if sighting in wanted}

    @staticmethod
    def _goes(sighting: Sighting, soon: set[str]) -> bool:
        """Whether an output will be replaced soon, as far as the model tells.

        Only one without gradient: those with one are of a forward that keeps about as much for its backward.
        """
        return sighting.node is None and sighting.name in soon

    def _depth_is_enough(self) -> bool:
        """Whether there are blocks or two resolutions, so that layers evenly spaced in depth are not asked for."""
        if self._strided:
            return True
        smallest = self._smallest.cells if self._smallest else 0
        return self._blocks.repeat() or any(cells > LEVEL_RATIO * smallest for cells in self._written if smallest)

    def _not_beaten(self, group: list[Sighting], level: bool = False) -> list[Sighting]:
        """Leave out what is certain not to be the last output of the outermost module of its group."""
        return [
            one
            for place, one in enumerate(group)
            if not any(self._is_nearer(earlier, one, level) for earlier in group[:place])
            and not any(self._replaces(later, one, level) for later in group[place + 1 :])
        ]

    def _is_nearer(self, earlier: Sighting, later: Sighting, level: bool) -> bool:
        """Whether an output is certain to be preferred to a later one, which lies deeper."""
        if level and not self._sure(earlier, later):
            return False
        return (self._nesting(earlier, later)[1], earlier.is_bare) < (self._nesting(later, earlier)[0], later.is_bare)

    def _replaces(self, later: Sighting, earlier: Sighting, level: bool) -> bool:
        """Whether an output is certain to be preferred to an earlier one."""
        if later.name in self._shared:
            return False  # the module is likely to be called again, and then is no stage
        if level and not self._sure(later, earlier):
            return False
        if self._time[earlier] < self._classified <= self._time[later]:
            return False  # what comes after the classifier may be no stage
        if level and self._smallest and self._time[earlier] <= self._time[self._smallest] < self._time[later]:
            return False  # it may belong to a decoder, which is left out
        return (self._nesting(later, earlier)[1], later.is_bare) <= (self._nesting(earlier, later)[0], earlier.is_bare)

    def _nesting(self, one: Sighting, other: Sighting) -> tuple[int, int]:
        """Return the fewest and the most blocks that `one` may turn out to lie in, without those around both."""
        around = [name for name in self._around(one, other) if name in self._nests]
        least = sum(self._is_seen(name) for name in around)
        return least, least + sum(name not in self._ended and not self._is_seen(name) for name in around)

    def _is_seen(self, name: str) -> bool:
        """Whether a module's output may be a stage; for a module still running, whether one of its type was."""
        if name in self._ended:
            return self._ended[name] is not None
        return type(self._modules[name]) in self._kinds_seen

    def _sure(self, one: Sighting, other: Sighting) -> bool:
        """Whether no block around `one` alone is still to tell if it returns to a larger map."""
        return not self._open(self._around(one, other))

    def _open(self, names: Iterable[str]) -> bool:
        return any(name in self._nests and name not in self._ended for name in names)

    def _is_detour(self, sighting: Sighting) -> bool:
        around = (self._ended.get(name) for name in ancestors(sighting.name))
        return any(outer.cells > sighting.cells for outer in around if outer)

    @staticmethod
    def _around(one: Sighting, other: Sighting) -> list[str]:
        shared = set(ancestors(other.name))
        return [name for name in ancestors(one.name) if name not in shared]


class _Blocks:
    """The blocks of each type that is there more than once, at the places where stages will be."""

    def __init__(self, names: dict[str, nn.Module]) -> None:
        layers = [name for name, module in names.items() if has_weights(module)]
        kinds: dict[type, list[str]] = defaultdict(list)
        for name, module in names.items():
            if is_block(module):
                kinds[type(module)].append(name)

        def rank(kind: type) -> tuple[int, int]:
            return held(kinds[kind], layers), -kinds[kind][0].count(".")

        self._places: dict[type, set[str]] = {}
        self._names: dict[type, set[str]] = {}
        for kind in sorted(kinds, key=rank, reverse=True):
            blocks = outermost(kinds[kind])
            if len(blocks) > 1:
                self._names[kind] = set(blocks)
                self._places[kind] = {blocks[place] for place in even_places(len(blocks))}
        self._seen: dict[type, list[Sighting]] = defaultdict(list)

    def add(self, sighting: Sighting) -> None:
        kind = type(sighting.module)
        if sighting.name in self._names.get(kind, ()):
            self._seen[kind].append(sighting)

    def leave_out(self, sighting: Sighting) -> None:
        seen = self._seen[type(sighting.module)]
        if sighting in seen:
            seen.remove(sighting)

    def repeat(self) -> bool:
        """Whether several blocks of one type were seen at one resolution."""
        return any(len(self._seen[kind]) > 1 for kind in self._at_one_resolution())

    def wanted(self) -> set[Sighting]:
        """Return the blocks to keep: of the type with most layers, and of those inside as long as it was not seen."""
        wanted: set[Sighting] = set()
        for kind in self._at_one_resolution():
            wanted |= {sighting for sighting in self._seen[kind] if sighting.name in self._places[kind]}
            if self._seen[kind]:
                break
        return wanted

    def _at_one_resolution(self) -> list[type]:
        return [kind for kind in self._names if len({sighting.cells for sighting in self._seen[kind]}) < 2]


def _with_several_names(model: nn.Module) -> set[str]:
    """Return the first names of the modules that are at several places of the model."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {name for name, module in model.named_modules() if places[module] > 1}


def _layers_soon_replaced(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the layers that an activation follows in a sequence, and those that come once more alike.

    Their own outputs are not the last ones at their resolution, the first ones not even the last ones at their depth.
    """
    activated, repeated = set(), set()
    for outer, parent in model.named_modules():
        children = [(f"{outer}.{name}" if outer else name, child) for name, child in parent.named_children()]
        for place, (name, child) in enumerate(children[:-1]):
            rest = [module for _, module in children[place + 1 :]]
            if is_leaf(child) and has_weights(child):
                if isinstance(parent, nn.Sequential) and _activates(rest):
                    activated.add(name)
                if repr(child) == repr(rest[0]):
                    repeated.add(name)
    return activated, repeated


def _has_strides(modules: Iterable[nn.Module]) -> bool:
    """Whether convolutions write at several resolutions: one has a stride, or a pooling lies between two."""
    written = pooled = False
    for module in modules:
        stride = getattr(module, "stride", 1)
        strided = any(size > 1 for size in (stride if isinstance(stride, tuple) else [stride]) if isinstance(size, int))
        if isinstance(module, _ConvNd):
            if written and (strided or pooled):
                return True
            written = True
        elif isinstance(module, (_MaxPoolNd, _AvgPoolNd)):
            pooled = pooled or (written and strided)
    return False


def _activates(modules: list[nn.Module]) -> bool:
    """Whether the first of the modules, but for normalisation and dropout, is an activation."""
    passed = itertools.dropwhile(lambda module: isinstance(module, KEEPING_THE_SHAPE), modules)
    return type(next(passed, None)).__module__ == nn.ReLU.__module__
