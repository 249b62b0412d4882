"""One forward of a model, watched: what every module in it returned, as a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from sfr.model.candidates import Candidates
from sfr.model.outputs import features_in, last_in, logits_in, named_parts
from sfr.model.reading import Reader
from sfr.model.settings import StageSettings
from sfr.model.sharded import has_sharded_weights
from sfr.model.trace import Sighting, Trace


def watch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: StageSettings,
    *,
    call: Callable[..., Any] | None = None,
    named: Sequence[str] = (),
    keep: bool = False,
) -> tuple[Any, Trace]:
    """Run one forward and return its output and what it has shown.

    Of the outputs of the modules it holds shapes and places in the autograd graph, and on request also those that may
    become stages, see :class:`sfr.model.candidates.Candidates`.

    Args:
        model: the plain model.
        args, kwargs: arguments of the forward.
        settings: its ``layout`` and ``prefix_tokens`` overrule what is seen.
        call: what is called with the arguments; default `model`.
        named: names of the stages, if the user gave them.
        keep: whether to keep alive the outputs that may become stages.
    """
    watcher = _Watcher(model, batches_in(args, kwargs), settings, named, keep)
    with ExitStack() as hooks:
        # Compiled parts of the model run eagerly meanwhile: the hooks are for this forward only.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.callback(module.register_forward_pre_hook(watcher.weights_hook(name)).remove)
                hooks.callback(module.register_forward_hook(watcher.hook(name)).remove)
        output = (call or model)(*args, **kwargs)
    return output, watcher.trace(output)


class _Watcher:
    """Takes down the outputs of the modules, one after another."""

    def __init__(
        self, model: nn.Module, batches: list[int], settings: StageSettings, named: Sequence[str], keep: bool
    ) -> None:
        self._model, self._batches, self._settings, self._named = model, batches, settings, tuple(named)
        self._gradient = torch.is_grad_enabled()
        self._reader = Reader(settings, batches, named=named)
        self._candidates = Candidates(model) if keep else None
        self._sightings: list[Sighting] = []
        self._outputs: dict[str, TensorWeakRef] = {}
        self._calls: Counter[str] = Counter()
        self._without_gradient: dict[str, bool] = {}
        self._sharded: list[str] = []

    def weights_hook(self, name: str) -> Callable[..., None]:
        """Return the hook that looks at the weights of a module, which FSDP2 has gathered by now."""

        def see(module: nn.Module, _: Any) -> None:
            if has_sharded_weights(module):
                self._sharded.append(name)

        return see

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward hook of a module."""

        def see(module: nn.Module, _: Any, output: Any) -> None:
            # Without the gradient of the rest, inside reentrant checkpointing, an output is no use as a feature.
            if torch.is_grad_enabled() != self._gradient:
                self._without_gradient[name] = True
                return
            self._calls[name] += 1
            features = features_in(output)
            if features and features[0].ndim:
                # Of a recurrent layer it is known that its first output is its feature.
                self._note(name, module, features[0], sole=len(features) == 1 or isinstance(module, nn.RNNBase))
            elif self._candidates:
                self._candidates.leave_out(name)

        return see

    def _note(self, name: str, module: nn.Module, feature: Tensor, sole: bool) -> None:
        sighting = Sighting(name, module, tuple(feature.shape), feature.grad_fn, sole)
        self._sightings.append(sighting)
        self._outputs[name] = TensorWeakRef(feature)
        if self._candidates:
            self._candidates.add(self._reader.read(sighting), feature)

    def trace(self, output: Any) -> Trace:
        """Return all that was seen, read once more now that the batch of the logits is known.

        Args:
            output: of the model.
        """
        logits = logits_in(output)
        last = last_in(output)
        batches = self._batches
        if logits is not None and logits.ndim > 1:
            batches = list(dict.fromkeys([len(logits), *batches[:1]]))
        reader = Reader(self._settings, batches, self._sightings, self._named)
        outputs = {name: reference() for name, reference in self._outputs.items()}
        return Trace(
            sightings=tuple(reader.read(sighting) for sighting in self._sightings),
            calls=self._calls,
            counts=Counter(type(module) for module in self._model.modules()),
            logits_shape=None if logits is None else tuple(logits.shape),
            logits_node=None if logits is None else logits.grad_fn,
            last_shape=None if last is None else tuple(last.shape),
            last_node=None if last is None else last.grad_fn,
            batch=next(iter(self._batches), None),
            layout=self._settings.layout,
            without_gradient=tuple(self._without_gradient) if self._gradient else (),
            sharded=tuple(self._sharded),
            outputs={name: feature for name, feature in outputs.items() if feature is not None},
            model=type(self._model).__name__,
        )


def batches_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """Return what the batch may be by the input, the likeliest first.

    It is the length of the first tensor, or if that lies in a list, maybe of the list: several images, or sequences of
    several lengths.
    """
    arguments = (*args, *kwargs.values())
    found = (each for argument in arguments for each in _tensors_in(argument) if not each[0].is_nested and each[0].ndim)
    tensor, around = next(found, (None, ()))
    return [] if tensor is None else list(dict.fromkeys([len(tensor), *around]))


def _tensors_in(value: Any, around: tuple[int, ...] = (), depth: int = 4) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield the tensors in an argument, each with the lengths of the lists that it lies in."""
    if isinstance(value, Tensor):
        yield value, around
    elif depth and not isinstance(value, (str, bytes, nn.Module)):
        is_list = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
        parts = value if is_list else named_parts(value).values()
        for part in parts:
            yield from _tensors_in(part, (*around, len(value)) if is_list else around, depth - 1)
