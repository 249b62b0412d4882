"""SFRLoss: label term + weight(t) * feature term, in the place of nn.CrossEntropyLoss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from sfr.arguments import INDEX_BY_NAME, MEAN, called, check_label_loss, configuration, width_of
from sfr.compiling import eager
from sfr.config import IGNORE_INDEX, SFRConfig, Switches
from sfr.feature.term import NONE, Pair, Terms, feature_terms, matched_pairs
from sfr.labels.cross_entropy import cross_entropy
from sfr.labels.fitted import fitted
from sfr.labels.smoothing import DynamicLabelSmoothing
from sfr.labels.targets import checked_target
from sfr.model.graph import names_behind
from sfr.model.maps import Maps
from sfr.model.outputs import part_with_graph, the_logits
from sfr.model.record import Record, known_record, record_of, wrapped_in
from sfr.parts import LossParts
from sfr.preflight.report import Report, report
from sfr.state import TensorState
from sfr.step_warnings import EVALUATION, FROZEN, StepWarnings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SFRLoss(TensorState):
    r"""The criterion of self-feature regularization; takes the place of ``nn.CrossEntropyLoss()``.

    .. math:: L = L_\text{label} + \lambda_t \, L_\text{feature}

    The feature term is the mean over the (shallow, deep) pairs of :func:`sfr.emd_l2` between their nodes. The label
    term is cross-entropy, or with ``smoothing=`` :class:`sfr.DynamicLabelSmoothing`. The state (steps, label
    statistics) is in ``state_dict()``, so that a run resumes exactly.

    Every forward needs one call, right after it; several with the very same logits, as for the two labels of MixUp,
    are one step. In ``criterion.eval()``, under ``torch.no_grad()``, inside ``model.disable()`` and, with a warning, of
    a model in evaluation mode it is the plain cross-entropy, or `label_loss` alone. Under ``torch.compile`` it runs
    eagerly, as a whole. A sample whose features are not finite has a feature term of zero, and training goes on. One
    warning each says so, and if the feature term stays above a third of the loss for 50 steps (the label term counts as
    its largest so far, for it goes to zero), or trains nothing because all supervised stages are frozen.

    Args:
        model: the :class:`sfr.SFRWrapper`, also inside DDP or ``torch.compile``.
        config: the switches, or a mapping of some of them; default ``SFRConfig()``.
        label_loss: takes the place of the label term: for weighted classes, several labels an image, a regression, or
            (``lambda loss, _: loss``, called as ``criterion(loss, None)``) a model that computes its loss itself. It is
            called with the output of the model and the target as they are, and returns a 0-d tensor. The output is the
            logits only if the model returns them: of a Hugging Face model it is its ``ModelOutput``. A module's state
            is part of the criterion's. It goes with ``smoothing="none"``, the default, alone.
        num_classes: number of classes, >= 1; None takes the width of the model's last layer. It has an effect where
            ``state_dict()`` is asked for before the first batch, as by ``torch.distributed.checkpoint``.
        **switches: fields of :class:`sfr.SFRConfig`, which replace those of `config`.

    Raises:
        TypeError: if `model` holds no :class:`sfr.SFRWrapper`, `label_loss` cannot be called, or for an argument that
            is none, as those of ``nn.CrossEntropyLoss``, saying what takes its place.
        ValueError: if `model` holds several wrapped models, or for a switch that is out of range or without effect.

    Example:
        >>> from sfr import SFRWrapper
        >>> model = SFRWrapper(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, 2), nn.AdaptiveAvgPool2d(1),
        ...                                  nn.Flatten()))
        >>> criterion = SFRLoss(model, feature_weight=0.1)
        >>> criterion(model(torch.randn(2, 3, 16, 16)), torch.tensor([3, 7])).backward()
        >>> sorted(criterion.last.as_dict())
        ['feature', 'label', 'share', 'similarity 0 <- 1', 'weight']
    """

    state_names = required_names = ("step",)
    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: SFRConfig | Mapping[str, Any] | None = None,
        *,
        label_loss: Callable[[Any, Any], Tensor] | None = None,
        num_classes: int | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: the criterion does not own the model's parameters.
        object.__setattr__(self, "_model", wrapped_in(model))
        record = known_record(self._model)
        self.config = configuration(config, switches, record.config)
        check_label_loss(label_loss, self.config)
        self.label_loss = label_loss
        self.labels = DynamicLabelSmoothing(num_classes=num_classes, **self.config.of_labels())
        if label_loss is None and num_classes is None:
            self.labels.expect_classes(width_of(self._model))
        self.maps, self.warnings = Maps(self._model), StepWarnings()
        self.step = self._label_step = 0
        self._made_for = record.stated
        self._last: LossParts | None = None

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
        record = record_of(self._model) or Record(*self._made_for)  # of an unwrapped model: without features
        recorder = record.recorder
        if not self.training or not torch.is_grad_enabled() or record.disabled:
            recorder.excuse()
            return self._plain(output, target)
        if not record.check_use(self._model, self._made_for, self.label_loss is None and self.labels.exchanges):
            self.warnings.warn(EVALUATION)
            return self._plain(output, target)
        logits = the_logits(output) if self.label_loss is None else part_with_graph(output)
        terms: Terms | None = recorder.result_again(logits, self)  # as for the two labels of MixUp
        again = terms is not None
        features = {} if again else record.take_features(logits)
        self._label_step = self.labels.step = self._label_step if again else self.labels.step
        label = self.labels(logits, target, index) if self.label_loss is None else self._plain(output, target)
        self.step += not again
        weight = self.current_weight()
        if not again and weight and logits.numel():  # of an empty batch there are no features to match
            terms = self._checked_terms(features, logits)
        if logits.ndim:  # a loss in the place of logits comes once
            recorder.keep_result(logits, self, terms or NONE)
        if not terms:  # or the forward skipped the stages
            self._last = LossParts(label.detach().clone(), weight)  # loops that accumulate divide the loss in place
            return label
        weights = self._fitted(logits, target)
        if not terms.by_image.requires_grad:
            self.warnings.warn(FROZEN)
        self._last = LossParts(label.detach(), weight, terms.detached(), weights)
        self.warnings.see_parts(self._last, self.step, self.config.feature_weight)
        values = terms.weighted(weights)
        # The mean with its weight in one operation, and one back.
        return torch.add(label, values.sum().to(label.device), alpha=weight / values.numel())

    def _plain(self, output: Any, target: Any) -> Tensor:
        """Return the loss without the method: cross-entropy, or what was given for it."""
        if self.label_loss is not None:
            return called(self.label_loss, output, target)
        logits, ignore_index = the_logits(output), self.config.ignore_index
        return cross_entropy(logits, checked_target(logits, target, ignore_index), ignore_index)

    def _fitted(self, logits: Tensor, target: Any) -> Tensor | None:
        """Return how far the labels of each image are fitted, if that is to weigh its feature term."""
        if self.config.gate == "none" or self.label_loss is not None:
            return None
        return fitted(logits, target, self.config.ignore_index)

    def _checked_terms(self, features: Mapping[str, Tensor], logits: Tensor) -> Terms:
        """Return :meth:`terms_of`, once all stages are known to be of the batch of the logits."""
        self.maps.check(features, len(logits) if self.label_loss is None else None)
        maps, joining = self.maps.of(features), []
        if self.label_loss is None:
            # Through the logits every stage they were computed from gets a gradient; through a loss of the user's own,
            # it may not. The hook is set on the very output of the stage.
            joining = names_behind(logits, {name: each for name, each in features.items() if maps[name] is each})
        terms = self._terms(maps, joining)
        self.warnings.see_terms(terms, self.step)
        return terms

    def terms_of(self, features: Mapping[str, Tensor]) -> Terms:
        """Return the feature term of every pair, of features as ``model.sfr.take_features`` gives them."""
        return self._terms(self.maps.of(features))

    def _terms(self, maps: Mapping[str, Tensor], joining: Collection[str] = ()) -> Terms:
        return feature_terms(maps, order=self.maps.order(maps), joining=joining, **self.config.of_terms())

    def pairs_of(self, features: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Yield what the transport of each pair is between, of features as ``model.sfr.take_features`` gives them."""
        return matched_pairs(self.maps.of(features), order=self.maps.order(features), **self.config.of_pairs())

    def end_epoch(self) -> None:
        """Take over the class means of the epoch, with ``update="epoch"``; else nothing is to be done."""
        self.labels.end_epoch()

    def report(self, *example_input: Any, target: Any = None, repeats: int = 5) -> Report:
        """Show what the method does to the model and measure what it costs; see :func:`sfr.preflight.report.report`."""
        return report(self, *example_input, target=target, repeats=repeats)

    def twin(self, label_loss: Callable[[Any, Any], Tensor] | None) -> SFRLoss:
        """Return a new criterion for the same model, without gate, beside a copy of another loss if one is given."""
        config = self.config if label_loss is None else self.config.without_label_term()
        own = copy.deepcopy(label_loss) if isinstance(label_loss, nn.Module) else label_loss
        return SFRLoss(self._model, config, label_loss=own, gate="none")

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
        return self.__dict__ | {"_last": None}
