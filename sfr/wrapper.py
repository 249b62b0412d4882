"""SFRWrapper: a model whose stages are tapped, and that is otherwise the model itself."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfr.compiling import eager
from sfr.config import SFRConfig, no_such_field
from sfr.discovery import StageFinder
from sfr.nodes import View
from sfr.sightings import ancestors
from sfr.stages import find_stages
from sfr.taps import NEVER_FIRED_UNTIL_WARNING, WHY_SILENT, Recorder, Tap

if TYPE_CHECKING:
    from sfr.report import Report


NO_DATA_PARALLEL = (
    "nn.DataParallel copies the model to several GPUs for each forward, where no copy's features belong to the whole "
    "batch. Use DistributedDataParallel (accelerate launch, torchrun), or let the process see one GPU "
    "(CUDA_VISIBLE_DEVICES=0); Hugging Face's Trainer takes DataParallel by itself where one process sees several."
)


class SFRWrapper(nn.Module):
    """Wrap a model so that a training forward records the outputs of its stages for :class:`sfr.SFRLoss`.

    The wrapper adds nothing to the model. It shares the model's own tables of parameters, buffers and submodules, so
    that ``parameters()``, ``named_modules()`` and ``state_dict()`` carry the model's own names and load into the plain
    model and back; attributes it does not have itself are read from and written to the model. In evaluation mode and
    under ``torch.no_grad()`` nothing is recorded.

    Stages not named in the configuration are discovered, and how the outputs of stages are read (layout, class tokens)
    is seen: in a forward of `example_input` if given, else in the first training forward, at no extra cost. Under
    ``torch.compile`` that forward runs eagerly; with ``fullgraph=True`` it cannot.

    Args:
        model: any ``nn.Module``; wrap it before DDP, FSDP or ``accelerator.prepare``, before or after
            ``torch.compile``.
        config: the switches, or a mapping of some of them; default ``SFRConfig()``.
        example_input: arguments for one forward in evaluation mode without gradient: a tensor, a tuple of
            positional or a dict of keyword arguments.
        record_in_eval: record forwards in evaluation mode, too, if they are with gradient, for training with frozen
            batch normalisation; a validation loss then needs ``criterion.eval()`` or ``torch.no_grad()``.
        **overrides: fields of :class:`sfr.SFRConfig` that replace those of `config`.

    Raises:
        TypeError: if `model` is no ``nn.Module``, `config` no configuration, or for an override that is no field of it.
        ValueError: if the model is wrapped already or holds an ``nn.DataParallel`` over several GPUs, or a stage is
            unknown, or there are fewer than two.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten())
        >>> model = SFRWrapper(model, example_input=torch.zeros(1, 3, 16, 16))
        >>> model.stage_names
        ('1', '3')
        >>> type(model.unwrap()).__name__
        'Sequential'
    """

    _model: nn.Module
    _config: SFRConfig
    _recorder: Recorder
    _stage_names: tuple[str, ...] | None
    _views: dict[str, View] | None
    _watches: int
    _left_out: tuple[str, ...]
    _disabled: bool
    _joining: bool
    _record_in_eval: bool
    # Tells Hugging Face's Trainer that the forward takes no arguments but the model's: the loss is not computed there.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        config: SFRConfig | Mapping[str, Any] | None = None,
        *,
        example_input: Any = None,
        record_in_eval: bool = False,
        **overrides: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("the model is a ScriptModule, which takes no hooks; wrap it before it is scripted")
        for name, module in model.named_modules():
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                raise ValueError(f"{NO_DATA_PARALLEL} It is at {name or 'the root'!r} of the model")
            if isinstance(module, SFRWrapper) or _is_tapped(module):
                raise ValueError(
                    f"the model is wrapped already (at {name or 'its root'!r}); call unwrap() on that wrapper first"
                )
        super().__init__()
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        # Past nn.Module's own __setattr__, which would make the model a submodule of itself.
        object.__setattr__(self, "_model", model)
        self._config = _configuration(config, overrides)
        self._record_in_eval = record_in_eval
        self._recorder = Recorder()
        self._recorder.belong_to(self)
        self._stage_names = None
        self._views, self._watches = None, 0
        self._left_out = ()
        self._disabled = False
        self._joining = False
        if self._config.stages is not None:
            self._tap(find_stages(model, self._config.stages))
        if example_input is not None:
            self._discover_from(example_input)

    @property
    def sfr_config(self) -> SFRConfig:
        """The configuration of the wrapper and of the criterion made from it."""
        return self._config

    @property
    def stage_names(self) -> tuple[str, ...] | None:
        """Names of the tapped submodules; None before they are discovered."""
        return self._stage_names

    @property
    def stage_views(self) -> Mapping[str, View]:
        """How the output of each stage is read, as far as a watched forward has shown it."""
        return self._views or {}

    def stage(self, name: str) -> nn.Module:
        """Return a tapped submodule by its name."""
        return self._model.get_submodule(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; in a training forward with gradient, record the outputs of its stages."""
        if not torch.compiler.is_compiling():
            # Of DDP inside model.join(), which the criterion cannot see by itself.
            self._joining = _is_joining()
        if self._disabled or not self._records or not torch.is_grad_enabled():
            self._recorder.abort()
            return self._model(*args, **kwargs)
        if self._is_to_be_watched():
            # PyTorch's error shows the next line, with its hint, if torch.compile must not leave the graph.
            return self._discovering_forward(*args, **kwargs)  # with fullgraph=True pass example_input= or stages=
        return self._recorded_forward(*args, **kwargs)

    def _is_to_be_watched(self) -> bool:
        """Whether the stages are unknown, or how their outputs are read; of those that were skipped, not for ever."""
        if torch.compiler.is_compiling():
            return self._views is None and self._stage_names is None
        if self._views is None:
            return True
        return self._watches < NEVER_FIRED_UNTIL_WARNING and len(self._views) < len(self._stage_names or ())

    @property
    def _records(self) -> bool:
        """Whether the model is in a mode in which forwards with gradient are recorded."""
        return self._model.training or self._record_in_eval

    def _recorded_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._recorder.begin()
        try:
            output = self._model(*args, **kwargs)
        except BaseException:
            self._recorder.abort()
            raise
        self._recorder.end()
        if not torch.compiler.is_compiling():
            self._check_silence()
        return output

    def _check_silence(self, called: Collection[str] = ()) -> None:
        """Raise an error that names the stages that did not fire and never will, as far as can be told.

        Args:
            called: names of the modules that were called in the forward, if it was watched.
        """
        lost = [name for name in self._recorder.silent_stages() if name not in called and self._is_lost(name, called)]
        if lost:
            self._recorder.abort()
            raise RuntimeError(f"stage(s) {lost} did not fire in this forward: {WHY_SILENT}")

    def _is_lost(self, name: str, called: Collection[str]) -> bool:
        """Whether a stage that did not fire was replaced, run in parts, or compiled before it was tapped."""
        modules = dict(self._model.named_modules())
        hooks = modules[name]._forward_hooks.values() if name in modules else ()
        if not any(isinstance(hook, Tap) and hook.recorder is self._recorder for hook in hooks):
            return True
        if called:
            return any(name in ancestors(part) for part in called)
        around = (modules[outer] for outer in ("", name, *ancestors(name)) if outer in modules)
        return not self._recorder.has_fired(name) and any(map(_is_compiled, around))

    def take_features(self, logits: Tensor) -> dict[str, Tensor]:
        """Hand over the features of the last training forward, in forward order, and forget them.

        Args:
            logits: the output that the features must belong to.

        Raises:
            RuntimeError: if there are none, or the logits come from another forward, even in part.
        """
        if not self._recorder.recorded:
            raise RuntimeError(
                "no features are recorded. The criterion needs a forward of the wrapped model (not of the plain or "
                "unwrapped one) in training mode and with gradient just before it. It may be called again, as for the "
                "two labels of MixUp, only with the very same logits and before the next forward. For a validation "
                "loss call criterion.eval(), or compute it under torch.no_grad()."
            )
        features = self._recorder.take(logits)
        if features is None:
            raise RuntimeError(
                "the logits do not come from the last training forward of the wrapped model alone, whose features are "
                "recorded; call the criterion right after each forward, with its output, and add the losses"
            )
        return features

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Switch self-feature regularization off: inside, the model is plain and the criterion is cross-entropy."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @property
    def disabled(self) -> bool:
        """Whether the code runs inside :meth:`disable`."""
        return self._disabled

    def unwrap(self) -> nn.Module:
        """Take the taps off and return the very model that was wrapped."""
        self._recorder.detach()
        self._stage_names, self._views = (), {}
        return self._model

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Show what SFR does to this model and measure what it costs; see :func:`sfr.report.report`."""
        from sfr.report import report

        return report(self, *args, **kwargs)

    def _tap(self, stages: Mapping[str, nn.Module]) -> None:
        self._recorder.attach(stages)
        self._stage_names = tuple(stages)

    @eager
    def _discovering_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the first training forward and watch it."""
        named = self._stage_names is not None
        with StageFinder(self._model, self._config, self._stage_names or (), keep=True) as finder:
            output = self._recorded_forward(*args, **kwargs) if named else self._model(*args, **kwargs)
        if named:
            self._check_silence(finder.called)
        features = self._learn_from(finder)
        self._recorder.note_watched(None if named else features)
        return output

    def _learn_from(self, finder: StageFinder) -> dict[str, Tensor]:
        """Take over what a watched forward has shown, and return the features of the stages it was to find."""
        found = finder.found() if self._stage_names is None else {}
        if found:
            self._tap({name: stage.module for name, stage in found.items()})
        self._views = (self._views or {}) | finder.views(self._stage_names or ())
        self._watches += 1
        self._left_out = finder.left_out()
        return {name: stage.feature for name, stage in found.items() if stage.feature is not None}

    def _discover_from(self, example_input: Any) -> None:
        args, kwargs = forward_arguments(self, (example_input,))
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            self._model.eval()
            with torch.no_grad(), StageFinder(self._model, self._config, self._stage_names or ()) as finder:
                self._model(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        self._check_silence(finder.called)
        self._learn_from(finder)

    # What follows makes the wrapper indistinguishable from the model to the code around it.

    def train(self, mode: bool = True) -> SFRWrapper:
        self._model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.load_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recorder.belong_to(self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        # nn.DataParallel would go on to put the parts of its copies into the model itself.
        raise RuntimeError(NO_DATA_PARALLEL)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not there yet while copy and pickle build the object
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and "_model" in self.__dict__:
            # Code that sets the mode of one module after the other does not see the model, only its children.
            self._model.training = value
        if name.startswith("_") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._model, name)


def _configuration(config: object, overrides: dict[str, Any]) -> SFRConfig:
    """Return a configuration with some fields replaced."""
    if isinstance(config, Mapping):
        config = SFRConfig.from_dict(config)
    if config is None:
        config = SFRConfig()
    if not isinstance(config, SFRConfig):
        raise TypeError(
            f"config must be an SFRConfig or a mapping of its fields; got {type(config).__name__}. Single fields are "
            "given by name, as in SFRWrapper(model, weight=0.1), and an input as example_input="
        )
    message = no_such_field(overrides, also=("example_input", "record_in_eval"))
    if message:
        raise TypeError(f"SFRWrapper has no argument {message}")
    return dataclasses.replace(config, **overrides)


def _is_tapped(module: nn.Module) -> bool:
    """Whether a wrapper that is still in use taps a module; the taps of one that is gone are taken off."""
    taps = {key: hook for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)}
    if any(hook.recorder.in_use for hook in taps.values()):
        gc.collect()  # the wrapper may be gone but for a cycle, as with a traceback
    for key, hook in taps.items():
        if not hook.recorder.in_use:
            module._forward_hooks.pop(key, None)
    return any(hook.recorder.in_use for hook in taps.values())


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, in place or as the inner one of what ``torch.compile`` returns."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def forward_arguments(model: SFRWrapper, example_input: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example input into the positional and keyword arguments of a forward.

    Args:
        model: the wrapped model.
        example_input: the arguments one by one, or one tuple, list or dict of them.

    Raises:
        TypeError: if the model's forward does not take them.
    """
    args, kwargs = example_input, {}
    if len(example_input) == 1:
        (only,) = example_input
        kwargs = dict(only) if isinstance(only, Mapping) else {}
        args = () if kwargs else tuple(only) if isinstance(only, (tuple, list)) else (only,)
    try:
        signature = inspect.signature(model._model.forward)
    except ValueError:
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([type(each).__name__ for each in args] + [f"{name}=..." for name in kwargs])
        raise TypeError(
            f"the model is called as forward{signature}, and the example input gives it ({given}): {error}. Give what "
            "your loop calls the model with, as in model.report(x): of a batch (images, labels), the images alone"
        ) from None
    return args, kwargs


def _is_joining() -> bool:
    """Whether the code runs in the forward of a DDP model inside its ``join()``."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and active._join_config.enable
