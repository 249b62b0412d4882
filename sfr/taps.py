"""The hooks: they record stage outputs in a training forward and let go of them after use."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfr.outputs import feature_of

# Training forwards in a row whose features nobody used, before a warning says so.
UNUSED_UNTIL_WARNING = 10


class Tap:
    """Forward hook that hands the output of one stage to its :class:`Recorder`."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name = name
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.record(self.name, output)


class Recorder:
    """The features of the last training forward of one model.

    Between :meth:`begin` and :meth:`end` the taps record, each once; outside they do nothing, so that evaluation,
    a sub-module called on its own, and the recomputation of gradient checkpointing leave no trace. An output that is
    written into later in the forward, by an in-place activation, counts as it was left.
    """

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.unused: dict[str, Tensor] = {}
        self._recording = False
        self._unused_in_a_row = 0
        self._handles: list[RemovableHandle] = []
        self._names: tuple[str, ...] = ()

    def attach(self, stages: Mapping[str, nn.Module]) -> None:
        """Put a tap on each stage."""
        self._names = tuple(stages)
        self._handles = [stage.register_forward_hook(Tap(name, self)) for name, stage in stages.items()]

    def detach(self) -> None:
        """Take every tap off and forget all features."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._names = [], ()
        self.abort()

    def begin(self) -> None:
        """Start to record a new forward; features nobody used are set aside until the next ones are used."""
        if not torch.compiler.is_compiling() and self.features:
            self._note_unused()
        self.unused, self.features = self.features, {}
        self._recording = True

    def _note_unused(self) -> None:
        """Count a forward whose features nobody has used; warn, once, of many in a row."""
        self._unused_in_a_row += 1
        if self._unused_in_a_row == UNUSED_UNTIL_WARNING:
            warnings.warn(
                f"the features of {UNUSED_UNTIL_WARNING} forwards in a row were not used: SFR has no effect unless "
                "criterion = sfr.SFRLoss(model) takes the place of your loss. model.disable() trains without it.",
                stacklevel=6,
            )

    def record(self, name: str, output: Any) -> None:
        """Keep the tensor of a stage's output.

        Raises:
            RuntimeError: if the stage has been recorded in this forward already, or runs without gradient.
            TypeError: if the output holds no floating tensor.
        """
        if not self._recording:
            return
        if name in self.features:
            raise RuntimeError(
                f"stage {name!r} fired twice in one forward: it is shared or called in a loop. Tap the modules around "
                "it instead, with stages=[...]."
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"stage {name!r} ran without gradient inside a training forward. With gradient checkpointing pass "
                "use_reentrant=False, or tap the modules around the checkpointed one with stages=[...]; a part of the "
                "model under torch.no_grad() cannot be a stage."
            )
        self.features[name] = feature_of(name, output)

    def end(self) -> None:
        """Close the record.

        Raises:
            RuntimeError: if a stage was not called.
        """
        self._recording = False
        silent = [name for name in self._names if name not in self.features]
        if silent:
            self.features = {}
            raise RuntimeError(
                f"stage(s) {silent} did not fire in this forward: the module was skipped, replaced after wrapping, its "
                "parent calls its parts or .forward() itself, or the model was compiled before it was wrapped and it, "
                "or another of its class, had run. Leave it out of stages=[...], wrap after the change, or wrap first "
                "and compile then (torch.compiler.reset() forgets what has run)."
            )

    def abort(self) -> None:
        """Stop recording and forget all features."""
        self._recording = False
        self.features, self.unused = {}, {}

    def take(self, logits: Tensor) -> dict[str, Tensor] | None:
        """Hand over the features and forget them; None if the logits come from another forward, even in part."""
        features, unused = self.features, self.unused
        self.features, self.unused = {}, {}
        self._unused_in_a_row = 0
        return features if computed_from(logits, features, unused) else None

    def __getstate__(self) -> dict[str, Any]:
        # Features belong to one autograd graph: they can neither be copied nor pickled, and a copy has no use for them.
        return self.__dict__ | {"features": {}, "unused": {}, "_recording": False}


def computed_from(logits: Tensor, features: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether the logits were computed from one of the features and from none of the others.

    It is a walk back through the autograd graph that ends at the features. Those without a graph (of frozen layers)
    cannot tell; if none has one the answer is True.
    """
    own, foreign = _graph_nodes(features), _graph_nodes(others)
    if not own:
        return True
    found = False
    for node in graph_behind(logits, own | foreign):
        if node in foreign:
            return False
        found = found or node in own
        if found and not foreign:
            return True
    return found


def graph_behind(tensor: Tensor, ends: Container[Any] = ()) -> Iterator[Any]:
    """Yield the autograd nodes that a tensor was computed by, each once, the nearest first, and none behind `ends`."""
    waiting, seen = deque([tensor.grad_fn]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if node not in ends:
                waiting.extend(parent for parent, _ in node.next_functions)


def _graph_nodes(features: Mapping[str, Tensor]) -> set[Any]:
    return {feature.grad_fn for feature in features.values() if feature.grad_fn is not None}
