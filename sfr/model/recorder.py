"""The hooks: they record stage outputs in a training forward and let go of them after use."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfr.model.graph import computed_from
from sfr.model.outputs import feature_of, logits_in, tensors_in
from sfr.model.supervisor import Arguments
from sfr.warn import warn_user

# Training forwards in a row whose features nobody used, before a warning says so: if nobody ever has, and if somebody
# has. An attack on the images takes ten or twenty forwards with a plain loss before each step.
UNUSED_UNTIL_WARNING = 30
IDLE_UNTIL_WARNING = 100
# Training forwards in a row in which a stage did not fire, before a warning names it: one that never has, and any.
NEVER_FIRED_UNTIL_WARNING = 10
SILENT_UNTIL_WARNING = 100

WHY_SILENT = (
    "the module was skipped, replaced after wrapping, its parent calls its parts or .forward() itself, or the model "
    "was compiled before it was wrapped and it, or another of its class, had run. Leave it out of stages=[...], wrap "
    "after the change, or wrap first and compile then (torch.compiler.reset() forgets what has run)."
)


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

    output_shape: tuple[int, ...] | None = None  # of the model's logits, where an eager forward has shown them
    keeps_arguments = False  # for a supervisor
    arguments: Arguments | None = None  # what the model was called with, if that is kept
    _used = False  # whether a criterion has ever used the features

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.unused: list[Any] = []  # nodes of the autograd graph, or of a compiled forward the tensors
        self._let_go = False  # whether features were let go of because nobody could use them any more
        self._without_gradient: dict[str, bool] = {}
        self.order: list[str] = []  # the stages from the shallowest on, as far as forwards have shown
        self._recorded = False  # whether there is a forward to use, maybe one that skipped all stages
        self._recording = False
        self._unused_in_a_row = 0
        self._excused = False
        self._silent: dict[str, int] = {}
        self._fired: set[str] = set()
        self._watched = False
        self._handles: list[RemovableHandle] = []
        self._names: tuple[str, ...] = ()
        self._result: tuple[weakref.ref[Tensor], weakref.ref[object], Any] | None = None
        self._witness: weakref.ref[_Witness] | None = None
        self._witness_of_unused: weakref.ref[_Witness] | None = None

    @property
    def recording(self) -> bool:
        """Whether a forward is being recorded."""
        return self._recording

    def attach(self, stages: Mapping[str, nn.Module]) -> None:
        """Put a tap on each stage."""
        self._names, self.order = tuple(stages), list(stages)
        self._handles = [stage.register_forward_hook(Tap(name, self)) for name, stage in stages.items()]

    def detach(self) -> None:
        """Take every tap off and forget all features."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._names = [], ()
        self.abort()

    def begin(self, arguments: Arguments) -> None:
        """Start to record a new forward; features nobody used are set aside until the next ones are used."""
        if not torch.compiler.is_compiling():
            self.arguments = arguments if self.keeps_arguments else None
            # A forward without any gradient, as of the averaged teacher of a model, is none that trains.
            if not self._excused and (self._let_go or any(each.requires_grad for each in self.features.values())):
                self._note_unused()
            self._excused = self._let_go = False
            self.unused = list(_nodes_of(self.features.values()))
            self._witness_of_unused, self._witness = self._witness, None
        else:
            self.unused = list(self.features.values())
        self.features, self.output_shape = {}, None
        self._result = None  # also of a compiled forward: replayed CUDA graphs give one tensor in every forward
        self._recording, self._recorded, self._watched = True, False, False
        self._without_gradient = {}

    def excuse(self) -> None:
        """Take note that the features are left unused on purpose."""
        self._excused, self._unused_in_a_row = True, 0

    def _note_unused(self) -> None:
        """Count a forward whose features nobody has used; warn, once, of many in a row."""
        self._unused_in_a_row += 1
        if self._unused_in_a_row == (IDLE_UNTIL_WARNING if self._used else UNUSED_UNTIL_WARNING):
            warn_user(
                f"the features of {self._unused_in_a_row} forwards in a row were not used: SFR has no effect unless "
                "criterion = sfr.SFRLoss(model) takes the place of your loss. model.disable() trains without it."
            )

    def record(self, name: str, output: Any) -> None:
        """Keep the tensor of a stage's output; of one that also runs without gradient, the other output.

        Raises:
            RuntimeError: if the stage has been recorded in this forward already.
            TypeError: if the output holds no floating tensor.
        """
        if not self._recording:
            return
        if not torch.is_grad_enabled():
            self._without_gradient[name] = True
            return
        if name in self.features:
            raise RuntimeError(
                f"stage {name!r} fired twice in one forward: it is shared or called in a loop. Tap the modules around "
                "it instead, with stages=[...]. A model that calls one encoder for several inputs can call it once, on "
                "torch.cat([a, b]), with its stages named."
            )
        self.features[name] = feature_of(name, output)

    def end(self, output: Any = None) -> None:
        """Close the record.

        Args:
            output: of the model. Once nobody holds its part of the autograd graph, the features cannot be used any
                more, and they are let go of: else they would keep the graph of a forward that nobody trains.

        Raises:
            RuntimeError: if a stage ran without gradient only.
        """
        self._recording, self._recorded = False, bool(self._names)
        for name in self._without_gradient:
            if name not in self.features:
                raise RuntimeError(
                    f"stage {name!r} ran without gradient inside a training forward. With gradient checkpointing pass "
                    "use_reentrant=False, or tap the modules around the checkpointed one with stages=[...]; a part of "
                    "the model under torch.no_grad() cannot be a stage."
                )
        if not torch.compiler.is_compiling():
            self._end_with(output)

    def _end_with(self, output: Any) -> None:
        """Let go of the features, or later of their nodes, as soon as the nodes that made the output are gone."""
        logits = logits_in(output)
        self.output_shape = None if logits is None else tuple(logits.shape)
        nodes = {tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None}
        if not nodes:
            return
        recorder, witness = weakref.ref(self), _Witness()
        for node in nodes:
            node.metadata[witness] = True  # type: ignore[index]  # PyTorch types the property as a method

        def forget(gone: weakref.ref[_Witness]) -> None:
            owner = recorder()
            if owner is not None and owner._witness is gone:
                owner.features, owner._let_go = {}, True
            elif owner is not None and owner._witness_of_unused is gone:
                owner.unused = []

        self._witness = weakref.ref(witness, forget)

    def note_watched(self, features: dict[str, Tensor] | None = None) -> None:
        """Take note that the last forward was watched, and take over the features found by that."""
        self._watched = True
        if features is not None:
            self.features, self._recorded = features, True

    def silent_stages(self) -> list[str]:
        """Return the stages that did not fire in the last forward."""
        return [name for name in self._names if name not in self.features]

    def has_fired(self, name: str) -> bool:
        """Whether a stage was recorded in a forward used before, other than a watched one, which runs eagerly."""
        return name in self._fired

    def _note_silence(self) -> None:
        """Count the forwards in which a stage did not fire, as layers dropped at random do; warn, once, of many."""
        fired = iter(self.features)
        self.order = [next(fired) if name in self.features else name for name in self.order]
        if not self._watched:
            self._fired.update(self.features)
        for name in self._names:
            self._silent[name] = 0 if name in self.features else self._silent.get(name, 0) + 1
        for most, fired_before in ((NEVER_FIRED_UNTIL_WARNING, False), (SILENT_UNTIL_WARNING, True)):
            names = [name for name, count in self._silent.items() if count == most]
            self._warn_of_silence([name for name in names if (name in self._fired) == fired_before], most)

    @staticmethod
    def _warn_of_silence(names: list[str], forwards: int) -> None:
        if names:
            warn_user(
                f"stage(s) {names} did not fire in {forwards} forwards in a row, and the pairs with them are left out: "
                f"{WHY_SILENT}"
            )

    def abort(self) -> None:
        """Stop recording and forget all features."""
        self._recording = self._recorded = False
        self.features, self.unused, self._result, self.arguments = {}, [], None, None
        self._witness = self._witness_of_unused = None
        self._let_go = False

    @property
    def recorded(self) -> bool:
        """Whether the features of a forward can be taken, which may be none if it skipped all stages."""
        return self._recorded

    def pass_over(self, keeping: bool) -> None:
        """Let a forward pass without a record, and forget the last one unless it is worth keeping.

        Args:
            keeping: keep features that wait for the criterion, as while pseudo-labels are made. By their graph they can
                be told from those of any other forward.
        """
        waiting = self._recorded and not self._let_go and any(each.requires_grad for each in self.features.values())
        if torch.compiler.is_compiling() or not (keeping and waiting):
            self.abort()

    def take(self, logits: Tensor) -> dict[str, Tensor] | None:
        """Hand over the features and forget them; None if the logits come from another forward, even in part."""
        if self._let_go:
            self.abort()
            return None
        self._note_silence()
        features, own, unused = self.features, _nodes_of(self.features.values()), _nodes_of(self.unused)
        self.abort()
        self._unused_in_a_row, self._used = 0, True
        return features if computed_from(logits, own, unused - own) else None  # replayed graphs give the same tensors

    def keep_result(self, logits: Tensor, user: object, result: Any) -> None:
        """Keep what was made of the features until the logits are gone or the next forward begins."""
        recorder = weakref.ref(self)

        def forget(reference: weakref.ref[Tensor]) -> None:
            owner = recorder()
            if owner is not None and owner._result is not None and owner._result[0] is reference:
                owner._result = None

        self._result = weakref.ref(logits, forget), weakref.ref(user), result

    def result_again(self, logits: Tensor, user: object) -> Any:
        """Return what the same user made of the features, if these very logits come again; else None."""
        if self._result is None or self._result[0]() is not logits or self._result[1]() is not user:
            return None
        return self._result[2]

    def __getstate__(self) -> dict[str, Any]:
        # Features belong to one autograd graph: they can neither be copied nor pickled, and a copy has no use for them.
        nothing: dict[str, Any] = {"features": {}, "unused": [], "_without_gradient": {}, "_result": None}
        nothing |= {"_witness": None, "_witness_of_unused": None, "arguments": None}
        return self.__dict__ | nothing | {"_recording": False, "_recorded": False}


class _Witness:
    """Put into the metadata of an autograd node, it lives as long as the node."""


def _nodes_of(features: Iterable[Any]) -> set[Any]:
    """Return the nodes of tensors that have one; nodes are returned themselves."""
    nodes = (feature.grad_fn if isinstance(feature, Tensor) else feature for feature in features)
    return {node for node in nodes if node is not None}
