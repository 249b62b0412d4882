"""SFRLoss: label term + weight(t) * feature term, in the place of nn.CrossEntropyLoss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfr.compiling import eager
from sfr.config import IGNORE_INDEX, SFRConfig, near_names
from sfr.feature.term import Pair, Term, feature_terms, matched_pairs
from sfr.labels.smoothing import DynamicLabelSmoothing, checked_target, cross_entropy
from sfr.model.discovery import assumed_view
from sfr.model.formats import View, as_map
from sfr.model.outputs import part_with_graph, the_logits
from sfr.model.record import Record, known_record, record_of, wrapped_in
from sfr.model.stages import check_batches
from sfr.state import TensorState
from sfr.warn import warn_user

# Fields of the configuration that the feature term takes.
PAIR_SETTINGS = ("pairs", "max_grid", "grouping", "detach_deep", "cost")
TERM_SETTINGS = (*PAIR_SETTINGS, "marginals", "solver")

# How often the flag of non-finite features is read where that makes the host wait for the device.
CHECK_EVERY = 100
# A feature term that is more than this share of the loss for so many steps is warned of; where reading it makes the
# host wait, it is read as often as that. The label term counts as the largest so far, for when the labels are fitted
# it goes to zero, and every feature term outweighs it.
LARGE_SHARE, LARGE_STEPS = 1 / 3, 50

INDEX_BY_NAME = (
    "criterion(output, target) takes no third argument by position; numbers of samples are passed by name: "
    "criterion(output, target, index=index)"
)
MEAN = (
    "the loss is the mean over the batch: multiply it by len(target) for the sum; the plain losses of single images "
    "are nn.CrossEntropyLoss(reduction='none')(output, target)"
)
# What the arguments of nn.CrossEntropyLoss are called here.
INSTEAD = {
    "label_smoothing": "label smoothing of 0.1 is SFRWrapper(model, smoothing='uniform', alpha=0.1)",
    "reduction": MEAN,
    "size_average": MEAN,
    "reduce": MEAN,
}
CLASS_WEIGHTS = "class weights are those of a loss of your own: label_loss=nn.CrossEntropyLoss(weight=...)"
JOINED = (
    "with model.join(), a rank that has run out of batches takes no part in what the criterion exchanges between the "
    "ranks (label statistics, past predictions), and the others would wait for it or fail. Give all "
    "ranks the same number of batches (DistributedSampler, Accelerate's loaders), or set smoothing='uniform' or 'none' "
    "where the model is wrapped"
)
OTHER_SETTINGS = (
    "the model has been wrapped again, with other settings than those this criterion was made with: make a new one, "
    "criterion = sfr.SFRLoss(model)"
)
TRANSFORMED = (
    "the feature term cannot be computed inside a transform of torch.func (grad, vmap, jacrev, ...): the transport is "
    "solved on the values, which the transform hides. Take loss.backward(), or torch.autograd.grad(loss, ...), which "
    "also knows create_graph=True; and inside the transform a plain loss, such as F.cross_entropy"
)

EVALUATION = (
    "the criterion was called for a model in evaluation mode: the loss is the plain one, and neither step nor label "
    "statistics have moved. For a validation loss that is right, and criterion.eval() or torch.no_grad() says so. To "
    "train in evaluation mode (frozen batch normalisation), wrap with SFRWrapper(model, record_in_eval=True)."
)


@dataclass(frozen=True)
class LossParts:
    """The parts of one training loss, ``label + weight * feature``, detached and on their device.

    Args:
        label: the label term, 0-d.
        feature: the feature term before weighting, 0-d; zero where the weight is zero.
        weight: λ of this step.
        pairs: the feature term of each pair, by "shallow <- deep".
        distances: how far apart the two sides of each pair are under its plan: their feature term; with the cost
            "sqeuclidean", the term over the sum of the mean squares of both sides.
    """

    label: Tensor
    feature: Tensor
    weight: float
    pairs: dict[str, Tensor] = field(default_factory=dict)
    distances: dict[str, Tensor] = field(default_factory=dict)

    @property
    def similarity(self) -> dict[str, Tensor]:
        """How alike the two sides of each pair are, at most 1: 1 means equal nodes, 0 unrelated ones."""
        return {pair: 1 - distance for pair, distance in self.distances.items()}

    @property
    def share(self) -> Tensor:
        """The share of the weighted feature term in the loss, 0-d; 0 for a loss of zero."""
        weighted = self.weight * self.feature
        return (weighted / (self.label.abs() + weighted)).nan_to_num(nan=0.0)

    def as_dict(self) -> dict[str, float]:
        """Return label, feature, weight, share and "similarity shallow <- deep" of each pair for a log.

        It waits for the device.
        """
        parts = {"label": self.label, "feature": self.feature, "share": self.share}
        parts |= {f"similarity {pair}": value for pair, value in self.similarity.items()}
        return {"weight": self.weight} | {name: value.item() for name, value in parts.items()}


class SFRLoss(TensorState):
    r"""The criterion of self-feature regularization; takes the place of ``nn.CrossEntropyLoss()``.

    .. math:: L = L_\text{label} + \lambda_t \, L_\text{feature}

    The feature term is the mean over the (shallow, deep) pairs of :func:`sfr.emd_l2` between their nodes. The label
    term is cross-entropy, or with ``smoothing=`` :class:`sfr.DynamicLabelSmoothing`. Both are configured by the
    wrapper's :class:`sfr.SFRConfig`. The state (steps, label statistics) is in ``state_dict()``, so that a run resumes
    exactly (Accelerate: ``accelerator.register_for_checkpointing(criterion)``).

    Segmentation needs nothing else: logits (B, K, H, W) and labels (B, H, W), of which those that are the
    configuration's ``ignore_index`` are left out. The feature term, without labels, is of the whole images.

    Several forwards before one backward (crops of different sizes) need one call of the criterion after each. Several
    calls with the very same logits, as for the two labels of MixUp, are one step: each has the same feature term, and
    its labels count in the label statistics.

    `label_loss` takes the place of the label term, where that is not to be cross-entropy: for weighted classes, several
    labels an image, a regression, or (``lambda loss, _: loss``) a model that computes its loss itself, called as
    ``criterion(loss, None)``. It goes with ``smoothing="none"``, the default, alone.

    In ``criterion.eval()``, under ``torch.no_grad()``, inside ``model.disable()`` and, with a warning, of a model in
    evaluation mode it is the plain cross-entropy, or `label_loss` alone, for a validation loss that compares with other
    methods.

    A sample whose features are not finite has a feature term of zero, with one warning; training goes on. One warning
    says so if the feature term stays above a third of the loss for 50 steps. (The label term counts as its largest
    value so far, because it goes to zero once the labels are fitted.) Where all supervised stages are frozen, one
    warning says that the feature term trains nothing. Under ``torch.compile`` the criterion runs eagerly, as a whole.

    Args:
        model: the :class:`sfr.SFRWrapper`, also inside DDP or ``torch.compile``.
        label_loss: called with the output of the model and the target as they are, and to return a 0-d tensor. The
            output is the logits only if the model returns them: of a Hugging Face model it is its ``ModelOutput``, as
            in ``lambda output, target: F.cross_entropy(output.logits, target)``. A module's state is part of the
            criterion's. None means :class:`sfr.DynamicLabelSmoothing`.
        num_classes: number of classes, >= 1; None takes the width of the model's last layer. It has an effect where
            ``state_dict()`` is asked for before the first batch, as by ``torch.distributed.checkpoint``.

    Raises:
        TypeError: if `model` holds no :class:`sfr.SFRWrapper`, `label_loss` cannot be called, or for an argument of
            ``nn.CrossEntropyLoss``, saying what takes its place.
        ValueError: if `model` holds several wrapped models, or the configuration's ``smoothing`` would have no effect.

    Example:
        >>> from sfr import SFRWrapper
        >>> model = SFRWrapper(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, 2), nn.AdaptiveAvgPool2d(1),
        ...                                  nn.Flatten()))
        >>> criterion = SFRLoss(model)
        >>> criterion(model(torch.randn(2, 3, 16, 16)), torch.tensor([3, 7])).backward()
        >>> sorted(criterion.last.as_dict())
        ['feature', 'label', 'share', 'similarity 0 <- 1', 'weight']
    """

    state_names = required_names = ("step",)
    _model: nn.Module
    _nonfinite: Tensor | None
    config: SFRConfig

    def __init__(
        self,
        model: nn.Module,
        label_loss: Callable[[Any, Any], Tensor] | None = None,
        num_classes: int | None = None,
        **others: NoReturn,
    ) -> None:
        super().__init__()
        if others:
            raise TypeError(_what_to_use_instead(others))
        if isinstance(label_loss, type):
            name = label_loss.__name__
            raise TypeError(f"label_loss must be an instance; got the class {name}: pass label_loss={name}(...)")
        if label_loss is not None and not callable(label_loss):
            raise TypeError(f"label_loss must be a function of output and target, or None; got {label_loss!r}")
        # Past nn.Module's own __setattr__: the criterion does not own the model's parameters.
        object.__setattr__(self, "_model", wrapped_in(model))
        config = known_record(self._model).config
        if label_loss is not None and config.smoothing != "none":
            raise ValueError(
                f"smoothing={config.smoothing!r} has no effect beside label_loss, which takes the place of the label "
                "term: leave one of them out"
            )
        self.config = config
        self.labels = DynamicLabelSmoothing(
            mode=config.smoothing,
            alpha=config.alpha,
            alpha_end=config.alpha_end,
            alpha_steps=config.alpha_steps,
            momentum=config.momentum,
            update=config.update,
            ignore_index=config.ignore_index,
            num_samples=config.num_samples,
            num_classes=num_classes,
        )
        if label_loss is None and num_classes is None:
            self.labels.expect_classes(_width_of(self._model))
        self.label_loss = label_loss
        self.step = 0
        self._last: LossParts | None = None
        self._views: dict[str, View] = {}
        self._nonfinite = None
        self._large_since: int | None = None
        self._largest_label = 0.0
        self._warned: set[str] = set()
        self._label_step = 0

    @property
    def model(self) -> nn.Module:
        """The wrapped model whose features the criterion uses."""
        return self._model

    @property
    def last(self) -> LossParts:
        """The parts of the last training loss.

        Raises:
            RuntimeError: before the first one.
        """
        if self._last is None:
            raise RuntimeError("criterion.last is the parts of the last training loss, and there was none yet")
        return self._last

    @last.setter
    def last(self, parts: LossParts) -> None:
        self._last = parts

    def current_weight(self) -> float:
        """Return λ of the step under way or, between steps, of the last one."""
        return self.config.weight_at(self.step)

    @eager
    def forward(
        self,
        output: Any = None,
        target: Any = None,
        *misplaced: NoReturn,
        num_items_in_batch: Tensor | int | None = None,
        index: Tensor | None = None,
        input: Any = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss of one batch as a 0-d tensor.

        Args:
            output: output of the wrapped model for this batch: logits of shape (B, K), or (B, K, ...) with one
                prediction at each position, or a mapping that holds them as "logits" or "out" (Hugging Face's
                ``ModelOutput``, torchvision's segmentation models); whatever the `label_loss` takes, if there is one.
            target: class indices, shape (B,) or (B, ...), or soft targets of the shape of the logits; or whatever the
                `label_loss` takes.
            num_items_in_batch: labels in all the batches that one optimizer step accumulates; the loss is then this
                batch's share of their mean. Hugging Face's ``Trainer(compute_loss_func=criterion)`` passes it.
            index: numbers of the samples in the training set, shape (B,), for ``smoothing="past"``; else of no effect.
                ``StackDataset(dataset, range(len(dataset)))`` of ``torch.utils.data`` gives each sample with its own.
            input: another name of `output`, that of ``nn.CrossEntropyLoss``.
            reduction: "mean" and no other, for callers that pass what a loss function takes.

        Raises:
            RuntimeError: if the features recorded are not those of the forward that gave the logits, inside a transform
                of ``torch.func``, or inside ``model.join()`` of DDP, if there is something to exchange between the
                ranks.
            TypeError, ValueError: for an output or target of the wrong kind, shape or range.
        """
        if misplaced:
            raise TypeError(INDEX_BY_NAME)
        if reduction != "mean":
            raise ValueError(f"the criterion takes no reduction={reduction!r}; {MEAN}")
        loss = self._loss(input if output is None else output, target, index)
        if num_items_in_batch is None:
            return loss
        # The Trainer counts the labels that are not -100, whatever is ignored here: only so the shares sum to one.
        return loss * ((target != IGNORE_INDEX).sum() / num_items_in_batch)

    def _loss(self, output: Any, target: Any, index: Tensor | None) -> Tensor:
        record = record_of(self._model) or Record(self.config)  # of an unwrapped model: without features
        recorder = record.recorder
        if not self.training or not torch.is_grad_enabled() or record.disabled:
            recorder.excuse()
            return self._plain(output, target)
        if record.config is not self.config and record.config != self.config:
            raise RuntimeError(OTHER_SETTINGS)
        if not record.records(self._model) and not recorder.recorded:
            self._warn_once("evaluation", EVALUATION)
            return self._plain(output, target)
        if record.joining and self._exchanges():
            raise RuntimeError(JOINED)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            recorder.abort()  # what was recorded inside the transform is of no use outside
            raise RuntimeError(TRANSFORMED)
        logits = the_logits(output) if self.label_loss is None else part_with_graph(output)
        terms: dict[str, Term] | None = recorder.result_again(logits, self)  # as for the two labels of MixUp
        again = terms is not None
        features = {} if again else record.take_features(logits)
        self._label_step = self.labels.step = self._label_step if again else self.labels.step
        label = self.labels(logits, target, index) if self.label_loss is None else self._plain(output, target)
        self.step += not again
        weight = self.current_weight()
        if terms is None:  # of an empty batch there are no features to match
            terms = self._checked_terms(features, logits) if weight and logits.numel() else {}
        if logits.ndim:  # a loss in the place of logits comes once
            recorder.keep_result(logits, self, terms)
        if not terms:  # or the forward skipped the stages
            # A copy, because loops that accumulate gradients divide the loss in place.
            self.last = LossParts(label.detach().clone(), torch.zeros_like(label.detach()), weight)
            return label
        feature = torch.stack([term.value for term in terms.values()]).mean().to(label.device)
        if not feature.requires_grad:
            self._warn_once(
                "frozen",
                "all the supervised stages are frozen: the feature term takes time and trains nothing. Unfreeze them, "
                "or train inside model.disable() as long as they are frozen.",
            )
        pairs = {name: term.value.detach() for name, term in terms.items()}
        distances = {name: term.distance for name, term in terms.items()}
        self.last = LossParts(label.detach(), feature.detach(), weight, pairs, distances)
        self._warn_of_a_large_share(self.last)
        return label + weight * feature

    def _exchanges(self) -> bool:
        """Whether a training step exchanges something between the ranks."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return self.label_loss is None and self.labels.exchanges

    def _plain(self, output: Any, target: Any) -> Tensor:
        """Return the loss without the method: cross-entropy, or what was given for it."""
        if self.label_loss is None:
            logits, ignore_index = the_logits(output), self.config.ignore_index
            return cross_entropy(logits, checked_target(logits, target, ignore_index), ignore_index)
        loss = self.label_loss(output, target)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"label_loss must return a 0-d tensor; got {got}")
        return loss

    def end_epoch(self) -> None:
        """Take over the class means of the epoch; needed with ``update="epoch"`` only."""
        self.labels.end_epoch()

    def map_of(self, name: str, feature: Tensor) -> Tensor:
        """Return a stage's output as a map, channels first and without prefix tokens.

        Raises:
            ValueError: naming the stage, if its output cannot be read so.
        """
        view = self.view_of(name, feature)
        try:
            return as_map(feature, view)
        except ValueError as error:
            raise ValueError(f"stage {name!r} {error}") from None

    def view_of(self, name: str, feature: Tensor) -> View:
        """Return how a stage's output is read: as the configuration states, or else as seen or inferred."""
        if name not in self._views:
            try:
                seen = (known_record(self._model).views or {}).get(name)
                self._views[name] = seen or assumed_view(self._model.get_submodule(name), feature, self.config)
            except ValueError as error:
                raise ValueError(f"stage {name!r} {error}") from None
        return self._views[name]

    def pairs_of(self, features: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Yield what the transport of each pair is between, of features as ``model.sfr.take_features`` gives them."""
        return matched_pairs(self._maps(features), **self._settings(PAIR_SETTINGS, features))

    def terms_of(self, features: Mapping[str, Tensor]) -> dict[str, Term]:
        """Return the feature term of every pair, of features as ``model.sfr.take_features`` gives them."""
        return feature_terms(self._maps(features), **self._settings(TERM_SETTINGS, features))

    def _maps(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.map_of(name, feature) for name, feature in features.items()}

    def _settings(self, names: Sequence[str], features: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the settings of the feature term, and the names of all stages, also of those a forward skipped."""
        order = known_record(self._model).recorder.order
        order = order if features.keys() <= set(order) else list(features)
        return {name: getattr(self.config, name) for name in names} | {"order": order}

    def _checked_terms(self, features: dict[str, Tensor], logits: Tensor) -> dict[str, Term]:
        """Return :meth:`terms_of`, once all stages are known to be of the batch of the logits."""
        outputs = {
            name: (tuple(feature.shape), self.view_of(name, feature).layout) for name, feature in features.items()
        }
        check_batches(outputs, len(logits) if self.label_loss is None else None)
        terms = self.terms_of(features)
        self._warn_of_nonfinite(terms)
        return terms

    def _warn_of_nonfinite(self, terms: Mapping[str, Term]) -> None:
        """Warn, once, if an image's features are not finite; read seldom where that makes the host wait."""
        if "nonfinite" in self._warned or not terms:
            return
        found = ~torch.stack([term.finite.all() for term in terms.values()]).all()
        self._nonfinite = found if self._nonfinite is None else self._nonfinite | found
        if found.device.type != "cpu" and self.step % CHECK_EVERY:
            return
        if self._nonfinite:
            self._warn_once(
                "nonfinite",
                f"non-finite features at or before step {self.step}: their images get a feature term of zero. "
                "Look at the learning rate and, with float16, at the loss scale.",
            )
        self._nonfinite = None

    def _warn_of_a_large_share(self, parts: LossParts) -> None:
        """Warn, once, if the feature term has been a large share of the loss for many steps."""
        if "share" in self._warned or (parts.label.device.type != "cpu" and self.step % LARGE_STEPS):
            return
        self._largest_label = max(self._largest_label, float(parts.label))
        weighted = parts.weight * float(parts.feature)
        share = weighted / (weighted + self._largest_label) if weighted else 0.0
        if share <= LARGE_SHARE:
            self._large_since = None
        elif self._large_since is None:
            self._large_since = self.step
        if self._large_since is not None and self.step - self._large_since >= LARGE_STEPS - 1:
            self._warn_once(
                "share",
                f"the feature term has been more than a third of the loss for {LARGE_STEPS} steps. "
                f"It may keep the network from learning its labels: lower weight={self.config.weight}, or let it fall "
                "with weight=sfr.Ramp(...).",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_user(message)

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the step; called by ``state_dict``."""
        return {"step": torch.tensor(self.step)}

    def load_tensor_state(self, state: Mapping[str, Any]) -> None:
        """Restore the step; called by ``load_state_dict``."""
        self.step = int(state["step"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            # The checkpoint of a module trained without this criterion, which then starts where it stands.
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None, "_nonfinite": None}


def _width_of(model: nn.Module) -> int | None:
    """Return the width of the last layer of a model, by which its classes are counted before there are logits."""
    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    if not layers:
        return None
    return getattr(layers[-1], "out_features", getattr(layers[-1], "out_channels", None))


def _what_to_use_instead(arguments: Mapping[str, Any]) -> str:
    """Return what to write for arguments that SFRLoss does not take: of nn.CrossEntropyLoss, or misspelled."""
    name, value = next(iter(arguments.items()))
    settings = [field.name for field in fields(SFRConfig)]
    if name == "weight" and isinstance(value, Tensor):
        hint = CLASS_WEIGHTS
    elif name in INSTEAD:
        hint = INSTEAD[name]
    elif name in settings:
        hint = f"set it where the model is wrapped: SFRWrapper(model, {name}={value!r})"
    else:
        own = [*inspect.signature(SFRLoss.__init__).parameters][1:-1]
        near = near_names(name, [*own, *settings])
        hint = f"near names: {near}" if near else f"it takes {', '.join(own)}"
    return f"SFRLoss takes no argument {name!r}; {hint}"
