"""Record: what is kept of a wrapped model, and how its calls are recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfr.compiling import eager, is_compiled
from sfr.config import SFRConfig
from sfr.model.agreement import first_found
from sfr.model.choose import choose, single_cells
from sfr.model.formats import View
from sfr.model.graph import on_other_branches
from sfr.model.joining import Joining
from sfr.model.kinds import ancestors
from sfr.model.messages import JOINED, NO_FEATURES, OTHER_SETTINGS, TRANSFORMED
from sfr.model.outputs import on_this_rank
from sfr.model.reading import seen_logits, views_of
from sfr.model.recorder import NEVER_FIRED_UNTIL_WARNING, WHY_SILENT, Recorder, Tap
from sfr.model.rows import Returned
from sfr.model.settings import StageSettings
from sfr.model.stages import find_stages
from sfr.model.tied import settle
from sfr.model.trace import Trace
from sfr.model.unchanged import modes_kept
from sfr.model.watch import watch

# The one attribute that a wrapped model has and the plain one has not; it holds the record.
RECORD = "_sfr"


class Record:
    """The stages of one wrapped model, and the calls of it.

    It does not hold the model, which holds it: copies of the model have a copy of it.

    Args:
        settings: what the user states of the stages.
        config: switches of the criterion that were given to the wrapper, as until the next release they may be.
        in_eval: whether to record forwards in evaluation mode, too, if they are with gradient.
    """

    # Of the class, for models that were pickled before there were these.
    apart: frozenset[frozenset[str]] = frozenset()  # pairs of stages that were found on different branches
    returned: Returned | None = None  # what a watched forward has shown of the logits

    def __init__(self, settings: StageSettings, config: SFRConfig, in_eval: bool = False) -> None:
        self.settings, self.config = settings, config
        self.in_eval = in_eval
        self.recorder = Recorder()
        self.stage_names: tuple[str, ...] | None = None
        self.views: dict[str, View] | None = None
        self.left_out: tuple[str, ...] = ()
        self.disabled = False
        self.joining = Joining()
        self._watches = 0

    @property
    def stated(self) -> tuple[StageSettings, SFRConfig]:
        """What the user stated where the model was wrapped."""
        return self.settings, self.config

    def start(self, model: nn.Module, example: tuple[tuple[Any, ...], Mapping[str, Any]] | None) -> None:
        """Tap the stages that the settings name; if there are arguments for a forward, watch one."""
        if self.settings.stages is not None:
            self.tap(find_stages(model, self.settings.stages))
        if example is not None:
            self._watch_evaluation(model, *example)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Record nothing inside, and let the criterion be the plain one."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    def tap(self, stages: Mapping[str, nn.Module]) -> None:
        """Put a tap on each of these modules."""
        self.recorder.attach(stages)
        self.stage_names = tuple(stages)

    def for_copy(self, model: nn.Module, shallow: bool = False) -> Record:
        """Return a record like this one that taps another model of the same structure.

        Args:
            model: the copy.
            shallow: whether it has the very parts of the original, with the taps of that and of its other copies.
        """
        record = Record(self.settings, self.config, self.in_eval)
        record.views, record.left_out = self.views, self.left_out
        record.apart, record.returned = self.apart, self.returned
        stages = {name: model.get_submodule(name) for name in self.stage_names or ()}
        for stage in () if shallow else stages.values():  # copies of the taps serve nobody
            for key, hook in list(stage._forward_hooks.items()):
                if isinstance(hook, Tap) and hook.recorder is not self.recorder:
                    del stage._forward_hooks[key]
        if stages:
            record.tap(stages)
        return record

    def call(self, model: nn.Module, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the model; in a training forward with gradient, record the outputs of its stages.

        Args:
            model: the model.
            plain: calls the model as if it were not wrapped. It is a function and no bound method, which Dynamo would
                look up anew, after a graph break, in the class that the model has now.
            args, kwargs: arguments of the model.
        """
        if self.recorder.recording:  # the model calls itself
            return plain(model, *args, **kwargs)
        traced = False
        if not torch.compiler.is_compiling():
            self.joining.note_forward()
            traced = torch.jit._trace.is_tracing()  # into a model that nobody trains with the criterion
        if self.disabled or traced or not self.records(model) or not torch.is_grad_enabled():
            self.recorder.pass_over(keeping=not traced and (self.disabled or not torch.is_grad_enabled()))
            return plain(model, *args, **kwargs)
        if self._is_to_be_watched():
            # PyTorch's error shows the next line, with its hint, if torch.compile must not leave the graph.
            return self._watched_call(model, plain, args, kwargs)  # with fullgraph=True pass example_input= or stages=
        return self._recorded_call(model, plain, args, kwargs)

    def records(self, model: nn.Module) -> bool:
        """Whether the model is in a mode in which forwards with gradient are recorded."""
        return model.training or self.in_eval

    def check_use(self, model: nn.Module, stated: tuple[StageSettings, SFRConfig], exchanges: bool) -> bool:
        """Return whether there should be features to use; False for a model in evaluation mode.

        Args:
            model: the model.
            stated: what was :attr:`stated` when the criterion was made.
            exchanges: whether it exchanges something between the ranks.

        Raises:
            RuntimeError: if the features cannot be used here, saying why.
        """
        if stated != self.stated:
            raise RuntimeError(OTHER_SETTINGS)
        if not self.records(model) and not self.recorder.recorded:
            return False
        if exchanges and self.joining.inside and dist.is_available() and dist.is_initialized():
            raise RuntimeError(JOINED)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.recorder.abort()  # what was recorded inside the transform is of no use outside
            raise RuntimeError(TRANSFORMED)
        return True

    def _is_to_be_watched(self) -> bool:
        """Whether the stages are unknown, or how their outputs are read; of those that were skipped, not for ever."""
        if torch.compiler.is_compiling():
            return self.views is None and self.stage_names is None
        if self.views is None:
            return True
        return self._watches < NEVER_FIRED_UNTIL_WARNING and len(self.views) < len(self.stage_names or ())

    def _recorded_call(self, model: nn.Module, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.recorder.begin((args, kwargs))
        try:
            output = plain(model, *args, **kwargs)
            self.recorder.end(output)
        except BaseException:
            self.recorder.abort()
            raise
        if not torch.compiler.is_compiling():
            self._check_silence(model)
        return output

    @eager
    def _watched_call(self, model: nn.Module, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the first training forward and watch it."""
        named = self.stage_names is not None
        recorded = lambda *args, **kwargs: self._recorded_call(model, plain, args, kwargs)  # noqa: E731
        output, trace = watch(
            model, args, kwargs, self.settings, call=recorded, named=self.stage_names or (), keep=not named
        )
        if named:
            self._check_silence(model, trace.calls)
        features = self._learn_from(model, trace, agree=True)
        self.recorder.note_watched(None if named else features)
        return output

    def _watch_evaluation(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Watch a forward in evaluation mode, with the graph that a training forward has; leave the modes unchanged."""
        with modes_kept(model), self.disable(), torch.enable_grad():
            model.eval()
            _, trace = watch(model, args, kwargs, self.settings, named=self.stage_names or ())
        self._check_silence(model, trace.calls)
        self._learn_from(model, trace)

    def _learn_from(self, model: nn.Module, trace: Trace, agree: bool = False) -> dict[str, Tensor]:
        """Take over what a watched forward has shown, and return the features of the stages it was to find.

        Args:
            model: the model.
            trace: what was seen.
            agree: whether several ranks have to find the same stages: their forwards may skip different ones.
        """
        names = self.stage_names or tuple(choose(trace))
        if self.stage_names is None and agree:
            names = first_found(names, model, self.settings)
        views = settle(trace, views_of(trace, names))
        self.settings.check_tokens([view.layout for view in views.values()] if len(views) == len(names) else [])
        if self.stage_names is None:
            self.tap({name: model.get_submodule(name) for name in names})
            self.left_out = single_cells(trace)
            self.apart = on_other_branches({each.name: each.node for each in trace.sightings if each.name in views})
        self.views = (self.views or {}) | views
        self.returned = self.returned or seen_logits(trace, views)
        self._watches += 1
        return {name: on_this_rank(name, trace.outputs[name]) for name in names if name in trace.outputs}

    def _check_silence(self, model: nn.Module, called: Collection[str] = ()) -> None:
        """Raise an error that names the stages that did not fire and never will, as far as can be told.

        Args:
            model: the model.
            called: names of the modules that were called in the forward, if it was watched.
        """
        silent = self.recorder.silent_stages()
        lost = [name for name in silent if name not in called and self._is_lost(model, name, called)]
        if lost:
            self.recorder.abort()
            raise RuntimeError(f"stage(s) {lost} did not fire in this forward: {WHY_SILENT}")

    def _is_lost(self, model: nn.Module, name: str, called: Collection[str]) -> bool:
        """Whether a stage that did not fire was replaced, run in parts, or compiled before it was tapped."""
        modules = dict(model.named_modules())
        hooks = modules[name]._forward_hooks.values() if name in modules else ()
        if not any(isinstance(hook, Tap) and hook.recorder is self.recorder for hook in hooks):
            return True
        if called:
            return any(name in ancestors(part) for part in called)
        around = (modules[outer] for outer in ("", name, *ancestors(name)) if outer in modules)
        return not self.recorder.has_fired(name) and any(map(is_compiled, around))

    def take_features(self, logits: Tensor) -> dict[str, Tensor]:
        """Hand over the features of the last training forward, in forward order, and forget them.

        Args:
            logits: the output that the features must belong to.

        Raises:
            RuntimeError: if there are none, or the logits come from another forward, even in part.
        """
        if not self.recorder.recorded:
            raise RuntimeError(NO_FEATURES)
        features = self.recorder.take(logits)
        if features is None:
            raise RuntimeError(
                "the logits do not come from the last training forward of the wrapped model alone, whose features are "
                "recorded; call the criterion right after each forward, with its output, and add the losses. A "
                "criterion belongs to the model it was made for: for another one, or a copy, make a new SFRLoss"
            )
        return features

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside disable() or join() is not inside them for ever.
        return self.__dict__ | {"disabled": False, "joining": Joining()}


def record_of(model: nn.Module) -> Record | None:
    """Return the record of a model; None if it is not wrapped."""
    return vars(model).get(RECORD)


def known_record(model: nn.Module) -> Record:
    """Return the record of a wrapped model.

    Raises:
        RuntimeError: if it is not wrapped, or not any more.
    """
    record = record_of(model)
    if record is None:
        raise RuntimeError(f"the model, {type(model).__name__}, is not wrapped (any more): sfr.SFRWrapper(model)")
    return record


def wrapped_in(model: object) -> nn.Module:
    """Return the wrapped model that `model` is, or else that DDP, FSDP, torch.compile, PEFT or any module hold.

    Raises:
        TypeError: if there is none.
        ValueError: if there are several, naming them.
    """
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: module for name, module in parts if record_of(module) is not None}
    if not found:
        raise TypeError(f"SFRLoss needs an SFRWrapper: model = sfr.SFRWrapper(model); got {type(model).__name__}")
    if len(found) > 1 and "" not in found:
        raise ValueError(f"{type(model).__name__} holds several wrapped models, {[*found]}: pass one of them")
    return next(iter(found.values()))
