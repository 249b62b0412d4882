"""SFRWrapper: makes a model record the outputs of its stages, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn

from sfr.arguments import check_wrapper_arguments
from sfr.config import Layout, SFRConfig
from sfr.criterion import SFRLoss
from sfr.model.arguments import forward_arguments
from sfr.model.formats import View
from sfr.model.record import RECORD, Record, known_record, record_of
from sfr.model.settings import StageSettings
from sfr.model.wrapped_class import plain_class, swap_class, take_off, wrapped_class
from sfr.old_names import OLD_NAMES
from sfr.preflight.report import Report
from sfr.warn import deprecated

Value = TypeVar("Value")

NO_DATA_PARALLEL = (
    "nn.DataParallel copies the model to several GPUs for each forward, where no copy's features belong to the whole "
    "batch. Use DistributedDataParallel (accelerate launch, torchrun), or let the process see one GPU "
    "(CUDA_VISIBLE_DEVICES=0); Hugging Face's Trainer takes DataParallel by itself where one process sees several."
)


class SelfFeatures:
    """``model.sfr``: what wrapping adds to a model.

    Raises:
        RuntimeError: from all but :meth:`unwrap`, if the model has been unwrapped meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def _record(self) -> Record:
        return known_record(self._model)

    @property
    def config(self) -> SFRConfig:
        """The switches of a criterion that is made without any."""
        return self._record.config

    @property
    def stage_names(self) -> tuple[str, ...] | None:
        """Names of the tapped submodules; None before they are discovered."""
        return self._record.stage_names

    @property
    def stage_views(self) -> Mapping[str, View]:
        """How the output of each stage is read, as far as a watched forward has shown it."""
        return self._record.views or {}

    def stage(self, name: str) -> nn.Module:
        """Return a tapped submodule by its name."""
        return self._model.get_submodule(name)

    def disable(self) -> AbstractContextManager[None]:
        """Switch self-feature regularization off: inside, the model is plain and the criterion is cross-entropy."""
        return self._record.disable()

    @property
    def disabled(self) -> bool:
        """Whether the code runs inside :meth:`disable`."""
        return self._record.disabled

    def take_features(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the features of the last training forward, in forward order, and release them.

        Args:
            logits: the output that the features must belong to.

        Raises:
            RuntimeError: if there are none, or any part of the logits comes from another forward.
        """
        return self._record.take_features(logits)

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Report on a criterion made without any switch; see :meth:`sfr.SFRLoss.report`."""
        return SFRLoss(self._model).report(*args, **kwargs)

    def unwrap(self) -> nn.Module:
        """Undo the wrapping and return the model."""
        return unwrap(self._model)


class GivesWay(Generic[Value]):
    """An attribute of a wrapped model, unless the model has one of that name itself."""

    def __init__(self, get: Callable[[SelfFeatures], Value]) -> None:
        self._get = get

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, model: None, cls: type) -> GivesWay[Value]: ...
    @overload
    def __get__(self, model: nn.Module, cls: type) -> Value: ...
    def __get__(self, model: nn.Module | None, cls: type) -> GivesWay[Value] | Value:
        if model is None:
            return self
        try:
            # Parameters, buffers and submodules, and whatever the model's own __getattr__ finds.
            own: Value = cls.__getattr__(model, self._name)  # type: ignore[attr-defined]
            return own
        except AttributeError:
            return self._get(SelfFeatures(model))


class SFRWrapper(nn.Module):
    """Wrap a model so that a training forward records the outputs of its stages for :class:`sfr.SFRLoss`.

    It returns the same model object, wrapped in place: the model gets a subclass of its own class; its names, its
    ``state_dict()``, its attributes and what other libraries see of it do not change. It also gets ``sfr`` (see
    :class:`SelfFeatures`), ``unwrap()``, ``report()`` and ``disable()``. An attribute of that name that the model has
    itself takes precedence; use :func:`sfr.unwrap` if that is ``unwrap`` or ``sfr``. Nothing is recorded in evaluation
    mode, under ``torch.no_grad()``, or if the model is called as ``model.forward(x)``. A wrapped model is wrapped again
    with the new settings.

    If `stages` is not given, the stages are found by watching one forward, which also shows how their outputs are read
    (layout, class tokens): a forward of `example_input` if given, else the first training forward, at no extra cost.
    Under ``torch.compile`` that forward runs eagerly; with ``fullgraph=True`` it cannot.

    Args:
        model: any ``nn.Module``; wrap it before DDP, FSDP or ``accelerator.prepare``, before or after
            ``torch.compile``.
        stages: names of the submodules to tap (a sequence), a regular expression that their full names match (a
            string), or None to discover them: the last output at each spatial resolution.
        layout: memory layout of the stage outputs: "channels_first" (B, C, ...), "channels_last" (B, ..., C), "tokens"
            (B, N, C), "sequence_first" (N, B, C) or "vector" (B, C); "auto" infers it from their shape and the layers.
        prefix_tokens: tokens in front of a sequence that are no local features (class, distillation, register tokens)
            and are dropped, >= 0; "auto" counts those beyond the map that the sequence comes from.
        example_input: arguments for one forward in evaluation mode: a tensor, a tuple of
            positional or a dict of keyword arguments.
        record_in_eval: also record forwards in evaluation mode that have a gradient, for training with frozen batch
            normalisation; a validation loss then needs ``criterion.eval()`` or ``torch.no_grad()``.
        config, **switches: deprecated; they are arguments of :class:`sfr.SFRLoss`.

    Raises:
        TypeError: if `model` is not an ``nn.Module``, its class cannot be subclassed, or for an unknown argument.
        ValueError: if a part of the model is wrapped already, the model holds an ``nn.DataParallel`` over several GPUs,
            a stage is unknown, or there are fewer than two stages.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten())
        >>> model = SFRWrapper(net, example_input=torch.zeros(1, 3, 16, 16))
        >>> model is net
        True
        >>> model.sfr.stage_names
        ('1', '3')
        >>> isinstance(model, SFRWrapper), isinstance(model.unwrap(), SFRWrapper)
        (True, False)
    """

    def __new__(
        cls,
        model: nn.Module | None = None,
        config: SFRConfig | Mapping[str, Any] | None = None,
        *,
        stages: str | Sequence[str] | None = None,
        layout: Layout = "auto",
        prefix_tokens: int | Literal["auto"] = "auto",
        example_input: Any = None,
        record_in_eval: bool = False,
        **switches: Any,
    ) -> SFRWrapper:
        if cls is not SFRWrapper:
            return super().__new__(cls)  # of a wrapped class: a copy, or type(model)(...)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("the model is a ScriptModule, which takes no hooks; wrap it before it is scripted")
        for name, module in model.named_modules():
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                raise ValueError(f"{NO_DATA_PARALLEL} It is at {name or 'the root'!r} of the model")
            if name and record_of(module) is not None:
                raise ValueError(
                    f"a part of the model is wrapped already, {name!r}: undo that first, with "
                    f"sfr.unwrap(model.get_submodule({name!r})), or wrap no more than that part"
                )
        own: dict[str, Any] = {"stages": stages, "layout": layout, "prefix_tokens": prefix_tokens}
        own, switches = _sorted_out(own, config, switches)
        record = Record(StageSettings(**own), SFRConfig.from_dict(switches), record_in_eval)
        example = None if example_input is None else forward_arguments(model, (example_input,), {})
        outer = wrapped_class(plain_class(type(model), SFRWrapper), SFRWrapper)
        try:
            record.start(model, example)
        except BaseException:
            record.recorder.detach()
            raise
        vars(unwrap(model))[RECORD] = record
        return swap_class(model, outer)  # type: ignore[return-value]

    sfr = GivesWay(lambda features: features)
    unwrap = GivesWay(lambda features: features.unwrap)
    report = GivesWay(lambda features: features.report)
    disable = GivesWay(lambda features: features.disable)

    def _replicate_for_data_parallel(self) -> NoReturn:
        # nn.DataParallel would go on to put the parts of its copies into the model itself.
        raise RuntimeError(NO_DATA_PARALLEL)


def unwrap(model: nn.Module) -> nn.Module:
    """Undo the wrapping of a model, and return it; a model that is not wrapped is returned unchanged."""
    return take_off(model, SFRWrapper)


def _sorted_out(own: dict[str, Any], config: object, switches: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is the wrapper's own, and the criterion's switches that it is given, as until the next release."""
    check_wrapper_arguments(switches)
    if isinstance(config, SFRConfig):
        switches = config.to_dict() | switches
    elif isinstance(config, Mapping):
        own |= {name: config[name] for name in own if name in config}
        switches = {name: value for name, value in config.items() if name not in own} | switches
    elif config is not None:
        raise TypeError(
            f"SFRWrapper takes the model alone by position; got {type(config).__name__}. The rest is given by name, as "
            "an input, example_input="
        )
    if switches:
        moved = {name: OLD_NAMES.get(name, f"{name}=") for name in switches}
        switches.setdefault("gate", "none")  # there was none
        deprecated("SFRWrapper", {name: f"SFRLoss(model, {new})" for name, new in moved.items()})
    return own, switches
