"""One forward of a model, watched: what every module in it returned, as a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from sfr.model.candidates import Candidates
from sfr.model.outputs import features_in, logits_in
from sfr.model.reading import Reader
from sfr.model.settings import StageSettings
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
    watcher = _Watcher(model, _batch_of(args, kwargs), settings, named, keep)
    with ExitStack() as hooks:
        # Compiled parts of the model run eagerly meanwhile: the hooks are for this forward only.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.callback(module.register_forward_hook(watcher.hook(name)).remove)
        output = (call or model)(*args, **kwargs)
    return output, watcher.trace(output)


class _Watcher:
    """Takes down the outputs of the modules, one after another."""

    def __init__(
        self, model: nn.Module, batch: int | None, settings: StageSettings, named: Sequence[str], keep: bool
    ) -> None:
        self._model, self._batch, self._settings, self._named = model, batch, settings, tuple(named)
        self._gradient = torch.is_grad_enabled()
        self._reader = Reader(settings, [] if batch is None else [batch], named=named)
        self._candidates = Candidates(model) if keep else None
        self._sightings: list[Sighting] = []
        self._outputs: dict[str, TensorWeakRef] = {}
        self._calls: Counter[str] = Counter()

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward hook of a module."""

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
        self._outputs[name] = TensorWeakRef(feature)
        if self._candidates:
            self._candidates.add(self._reader.read(sighting), feature)

    def trace(self, output: Any) -> Trace:
        """Return all that was seen, read once more now that the batch of the logits is known.

        Args:
            output: of the model.
        """
        logits = logits_in(output)
        batch = len(logits) if logits is not None and logits.ndim > 1 else None
        batches = dict.fromkeys(size for size in (batch, self._batch) if size is not None)
        reader = Reader(self._settings, batches, self._sightings, self._named)
        outputs = {name: reference() for name, reference in self._outputs.items()}
        return Trace(
            sightings=tuple(reader.read(sighting) for sighting in self._sightings),
            calls=self._calls,
            counts=Counter(type(module) for module in self._model.modules()),
            logits_shape=None if logits is None else tuple(logits.shape),
            logits_node=None if logits is None else logits.grad_fn,
            batch=self._batch,
            layout=self._settings.layout,
            outputs={name: feature for name, feature in outputs.items() if feature is not None},
            model=type(self._model).__name__,
        )


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the length of the first axis of the first tensor among the arguments; None if there is none."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
    return next((len(tensor) for tensor in tensors), None)
