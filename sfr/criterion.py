"""SFRLoss: label term + weight(t) * feature term, used instead of nn.CrossEntropyLoss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfr.arguments import check_label_loss, configuration, width_of
from sfr.config import SFRConfig, Switches
from sfr.drop_in import DropInLoss
from sfr.feature.pairs import resolve_pairs
from sfr.feature.results import NONE, Pair, Terms
from sfr.feature.term import feature_terms, matched_pairs
from sfr.labels.smoothing import DynamicLabelSmoothing
from sfr.labels.term import LabelTerm
from sfr.model.maps import Maps
from sfr.model.record import Record, known_record, record_of, wrapped_in
from sfr.model.supervisor import Arguments, Supervisor
from sfr.parts import LossParts, sum_of_parts
from sfr.preflight.report import Report, report
from sfr.step_warnings import EVALUATION, StepWarnings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SFRLoss(DropInLoss):
    r"""The criterion of self-feature regularization; takes the place of ``nn.CrossEntropyLoss()``.

    .. math:: L = L_\text{label} + \lambda_t \, L_\text{feature}

    The feature term is the mean over the (shallow, deep) pairs of :func:`sfr.emd_l2` between their nodes; each image
    counts in it as far as its labels are fitted, see `gate` of :class:`sfr.SFRConfig`. The label term is cross-entropy,
    or with ``smoothing=`` :class:`sfr.DynamicLabelSmoothing`. The state (steps, label statistics) is in
    ``state_dict()``, so that a run resumes exactly.

    Call it once for each forward, right after it; several calls with the very same logits, as for the two labels of
    MixUp, are one step, and with past predictions an error. It is the plain cross-entropy, or `label_loss` alone, in
    ``criterion.eval()``, under ``torch.no_grad()``, inside ``model.disable()`` and, with a warning, if the model is in
    evaluation mode. Under ``torch.compile`` it runs eagerly, as a whole. A sample whose features are not finite has a
    feature term of zero, and training goes on. One warning each tells of that; of a feature term that stays above a
    third of the loss for 50 steps, beside the largest label term so far; and of one that trains nothing because its
    stages are frozen.

    Args:
        model: the :class:`sfr.SFRWrapper`, also inside DDP or ``torch.compile``.
        config: the switches, or a mapping of some of them; default ``SFRConfig()``.
        label_loss: replaces the label term: for weighted classes, several labels an image, a regression, or
            (``lambda loss, _: loss``, called as ``criterion(loss, None)``) a model that computes its loss itself. It is
            called with the output of the model and the target, both unchanged, and returns a 0-d tensor. The output is
            the logits only if the model returns them; a Hugging Face model returns its ``ModelOutput``. A module's
            state is part of the criterion's. It goes with ``smoothing="none"``, the default, alone, and there is no
            gate: the feature term counts in full.
        supervisor: gives the deep features in place of the model's own: another network of the same stages, such as
            ``AveragedModel(model)`` of ``torch.optim.swa_utils``, a slow average of the weights. It sees what the model
            was called with, without gradient, in the mode that it is in; a step costs that forward more. It is yours to
            move, to update and to save.
        num_classes: number of classes, >= 1; None takes the width of the model's last layer. It has an effect where
            ``state_dict()`` is asked for before the first batch, as by ``torch.distributed.checkpoint``.
        **switches: fields of :class:`sfr.SFRConfig`, which replace those of `config`.

    Raises:
        TypeError: if `model` holds no :class:`sfr.SFRWrapper`, `label_loss` cannot be called, `supervisor` is no
            module, or for an argument that is none, as those of ``nn.CrossEntropyLoss``, saying what takes its place.
        ValueError: if `model` holds several wrapped models or is its own supervisor, or for a switch that is out of
            range or without effect.

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
    optional = True  # a checkpoint of a module trained without this criterion leaves it at its start
    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: SFRConfig | Mapping[str, Any] | None = None,
        *,
        label_loss: Callable[[Any, Any], Tensor] | None = None,
        supervisor: nn.Module | None = None,
        num_classes: int | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: the criterion does not own the model's parameters.
        object.__setattr__(self, "_model", wrapped_in(model))
        record = known_record(self._model)
        self.config = configuration(config, switches, record.config)
        check_label_loss(label_loss, self.config, switches, num_classes)
        self.label_loss = label_loss
        self.labels = DynamicLabelSmoothing(num_classes=num_classes, **self.config.of_labels())
        if label_loss is None and num_classes is None:
            self.labels.expect_classes(width_of(self._model))
        self.maps, self.warnings = Maps(self._model), StepWarnings()
        self._supervisor = None if supervisor is None else Supervisor(supervisor, self._model)
        record.recorder.keeps_arguments |= supervisor is not None
        self.step = 0
        self._made_for = record.stated
        self._last: LossParts | None = None

    @property
    def model(self) -> nn.Module:
        """The wrapped model whose features the criterion uses."""
        return self._model

    @property
    def supervisor(self) -> nn.Module | None:
        """The network that gives the deep features in place of the model's own, if there is one."""
        return None if self._supervisor is None else self._supervisor.network

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

    def _loss(self, output: Any, target: Any, index: Tensor | None) -> Tensor:
        """Return the loss of one batch, 0-d; see :meth:`forward`."""
        label_term = LabelTerm(self.labels, self.label_loss, self.config)
        record = record_of(self._model) or Record(*self._made_for)  # of an unwrapped model: without features
        if not self.training or not torch.is_grad_enabled() or record.disabled:
            record.recorder.excuse()
            return label_term.plain(output, target)
        if not record.check_use(self._model, self._made_for, label_term.exchanges):
            self.warnings.warn(EVALUATION)
            return label_term.plain(output, target)
        logits = label_term.logits_in(output)
        terms: Terms | None = record.recorder.result_again(logits, self)  # as for the two labels of MixUp
        again, arguments = terms is not None, record.recorder.arguments
        features = {} if again else record.take_features(logits)
        label = label_term.of_step(output, target, index, again=again)
        self.step += not again
        weight = self.current_weight()
        if not again and weight and logits.numel():  # of an empty batch there are no features to match
            terms = self._terms_of_step(features, logits, arguments)
        if logits.ndim:  # an output that is a loss is used once
            record.recorder.keep_result(logits, self, terms or NONE)
        if not terms:  # or the forward skipped the stages
            self._last = LossParts(label.detach().clone(), weight)  # loops that accumulate divide the loss in place
            return label
        gate = label_term.gate(output, target, terms.by_image.shape[1], self.maps)
        self._last = LossParts(label.detach(), weight, terms.detached(), gate)
        self.warnings.see_parts(self._last, self.step, self.config.feature_weight)
        return sum_of_parts(label, weight, terms.weighted(gate))

    def _terms_of_step(self, features: Mapping[str, Tensor], logits: Tensor, arguments: Arguments | None) -> Terms:
        maps, joining = self.maps.of_step(features, logits if self.label_loss is None else None)
        maps, pairing = self.supervised(maps, arguments, **self._pairing(maps))
        terms = feature_terms(maps, joining=joining, **self.config.of_terms() | pairing)
        self.warnings.see_terms(terms, self.step)
        return terms

    def supervised(
        self, maps: dict[str, Tensor], arguments: Arguments | None, *, order: Sequence[str], pairs: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the maps, with those of the supervisor if there is one, and what is to be matched: order and pairs.

        Args:
            maps: of the model.
            arguments: what it was called with.
            order: names of all stages, the shallowest first.
            pairs: see :class:`sfr.SFRConfig`.
        """
        if self._supervisor is None or not maps:
            return maps, {"order": order, "pairs": pairs}
        deep = self.maps.of(self._supervisor.features(tuple(maps), arguments, next(iter(maps.values()))))
        names = {name: f"{name} of the supervisor" for name in order}
        return {**maps, **{names[name]: each for name, each in deep.items()}}, {
            "order": [*order, *names.values()],
            "pairs": [(order[i], names[order[j]]) for i, j in resolve_pairs(pairs, order)],
        }

    def terms_of(self, features: Mapping[str, Tensor]) -> Terms:
        """Return the feature term of every pair, of features as ``model.sfr.take_features`` gives them."""
        return feature_terms(self.maps.of(features), **self.config.of_terms() | self._pairing(features))

    def pairs_of(self, features: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Yield what the transport of each pair is between, of features as ``model.sfr.take_features`` gives them."""
        return matched_pairs(self.maps.of(features), **self.config.of_pairs() | self._pairing(features))

    def _pairing(self, names: Collection[str]) -> dict[str, Any]:
        """Return the order of the stages, and their pairs as stated; of stages that were found, those on one path."""
        order, stated, apart = self.maps.order(names), self.config.pairs, known_record(self._model).apart
        if not isinstance(stated, str) or not apart:
            return {"order": order, "pairs": stated}
        pairs = [(order[i], order[j]) for i, j in resolve_pairs(stated, order)]
        return {"order": order, "pairs": [pair for pair in pairs if frozenset(pair) not in apart] or stated}

    def end_epoch(self) -> None:
        """Take over the class means of the epoch, with ``update="epoch"``; else nothing is to be done."""
        self.labels.end_epoch()

    def report(self, *example_input: Any, target: Any = None, repeats: int = 5, **keywords: Any) -> Report:
        """Show what the method does to the model and measure what it costs; see :func:`sfr.preflight.report.report`."""
        return report(self, *example_input, target=target, repeats=repeats, **keywords)

    def twin(self, label_loss: Callable[[Any, Any], Tensor] | None) -> SFRLoss:
        """Return a new criterion for the same model, without gate, beside a copy of another loss if one is given."""
        config = self.config if label_loss is None else self.config.without_label_term()
        own = copy.deepcopy(label_loss) if isinstance(label_loss, nn.Module) else label_loss
        return SFRLoss(self._model, config, label_loss=own, supervisor=self.supervisor, gate="none")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}
