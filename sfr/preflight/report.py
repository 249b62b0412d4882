"""The preflight report: what SFR does to a model and what it costs, before a long run is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sfr.checks import check_number
from sfr.config import Ramp, SFRConfig
from sfr.feature.results import Pair
from sfr.model.arguments import forward_arguments
from sfr.model.maps import Maps
from sfr.model.outputs import logits_in
from sfr.model.record import Record, known_record
from sfr.model.unchanged import unchanged
from sfr.parts import LossParts
from sfr.preflight.cost import StepCost, compare_steps
from sfr.preflight.effect import effect_of
from sfr.transport import default_solver

NO_CLASSES = (
    "the terms of the loss are not shown, because random labels cannot be drawn: the output is no classes (fewer than "
    "two axes, or one column: a regression, or a model that computes its losses itself), or the loss is your own. "
    "Give a target: criterion.report(x, target=y)"
)

GATED = "        That is in full: of each image it counts as far as its labels are fitted, at first next to nothing."


@dataclass(frozen=True)
class StageRow:
    """One tapped stage: its name, the kind of module, the shape of its output, the layout taken, tokens dropped."""

    name: str
    kind: str
    shape: tuple[int, ...]
    layout: str
    dropped: int


@dataclass(frozen=True)
class PairRow:
    """One (shallow, deep) pair: nodes of both sides, channels compared, and problems solved per image."""

    shallow: str
    deep: str
    nodes: tuple[int, int]
    channels: int
    plans: int


@dataclass(frozen=True)
class Report:
    """What :func:`sfr.preflight.report.report` found; ``print`` it.

    Args:
        stages: the tapped stages, in forward order.
        pairs: the pairs that supervise.
        loss: the terms of one loss on random labels, with the largest λ of the training and the gate open, as it is
            once the labels are fitted; None for a model without classes.
        solver: the transport solver that "auto" stands for on this device.
        plain: time and memory of a step of the plain model with cross-entropy.
        sfr: time and memory of a step of the wrapped model with :class:`sfr.SFRLoss`.
        labels: which labels the loss is of.
        gated: whether the feature term of an image counts only as far as its labels are fitted.
        own_loss: whether the label term is a loss of the user's own, of any scale.
        notes: what is not shown or left out, and why.
    """

    stages: tuple[StageRow, ...]
    pairs: tuple[PairRow, ...]
    loss: LossParts | None
    solver: str
    plain: StepCost
    sfr: StepCost
    gated: bool = False
    own_loss: bool = False
    labels: str = "on random labels"
    notes: tuple[str, ...] = ()

    @property
    def time_ratio(self) -> float:
        """Median time of a step with SFR over that of the plain step."""
        return self.sfr.median / self.plain.median

    @property
    def memory_ratio(self) -> float:
        """Peak memory of a step with SFR over that of the plain step."""
        return self.sfr.peak_bytes / max(1, self.plain.peak_bytes)

    def __str__(self) -> str:
        stages = [
            (row.name, row.kind, "x".join(map(str, row.shape)), row.layout, row.dropped or "") for row in self.stages
        ]
        pairs = [
            (row.shallow, row.deep, f"{row.nodes[0]} x {row.nodes[1]}", row.channels, row.plans) for row in self.pairs
        ]
        times, peaks = (self.plain.median, self.sfr.median), (self.plain.peak_bytes, self.sfr.peak_bytes)
        return "\n".join(
            [
                _table(("stage", "module", "output", "layout", "tokens dropped"), stages),
                "",
                _table(("shallow", "supervised by", "nodes", "channels", "plans"), pairs),
                "",
                *(self._terms(self.loss) if self.loss else []),
                f"solver: {self.solver}",
                f"step:   {times[0] * 1e3:.1f} ms plain, {times[1] * 1e3:.1f} ms with SFR ({self.time_ratio:.2f}x, "
                f"medians of {len(self.plain.seconds)}, forward and backward)",
                f"memory: {peaks[0] / 2**20:.1f} MiB plain, {peaks[1] / 2**20:.1f} MiB with SFR "
                f"({self.memory_ratio:.2f}x, peak of one step)",
                *(f"note:   {note}" for note in self.notes),
            ]
        )

    def _terms(self, loss: LossParts) -> list[str]:
        """Return the lines on the terms of the loss."""
        parts = loss.as_dict()
        terms = f"{parts['label']:.3g} label + {loss.weight:g} x {parts['feature']:.3g} feature"
        lines = [
            f"loss:   {terms} (share {parts['share']:.1%}), {self.labels}",
            f"        {effect_of(parts['share'], parts['label'], own_loss=self.own_loss)}",
        ]
        return [*lines, GATED] if self.gated else lines


class Criterion(Protocol):
    """What the report needs of an :class:`sfr.SFRLoss`."""

    config: SFRConfig
    maps: Maps
    label_loss: Callable[[Any, Any], Tensor] | None

    @property
    def labels(self) -> Any: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def last(self) -> LossParts: ...

    def __call__(self, output: Any, target: Any, *, index: Tensor | None) -> Tensor: ...

    def pairs_of(self, features: Mapping[str, Tensor]) -> Iterator[Pair]: ...

    def twin(self, label_loss: Callable[[Any, Any], Tensor] | None) -> Criterion: ...


def report(criterion: Criterion, *example_input: Any, target: Any = None, repeats: int = 5, **keywords: Any) -> Report:
    """Run a few training steps and tell what a criterion does to its model and what it costs.

    Nothing is left behind: buffers, gradients, training mode, random state and the criterion's state are as before.
    Under several processes call it on any one rank or on all, before the model is prepared for them.

    Args:
        criterion: the :class:`sfr.SFRLoss`; stages of its model that are not yet discovered are.
        *example_input: arguments of one forward, best a batch of the size to be trained with: as the model takes them,
            ``report(x)``, ``report(x, mask=mask)`` or ``report(**batch)``, or all in one tuple or dict.
        target: the second argument of the criterion; None draws random labels. That needs a model that returns logits,
            or an output that has ``logits`` or begins with them, and a criterion without `label_loss`. Otherwise the
            mean of all numbers in the output is used as the loss.
        repeats: timed steps of each kind, >= 1.
        **keywords: arguments of the forward by name.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError: if the model's forward does not take such arguments, or it returns no floating-point tensor.
        ValueError: if the batch is empty, or `repeats` is out of range.
    """
    check_number("repeats", repeats, 1, whole=True)
    model = criterion.model
    record = known_record(model)
    args, kwargs = forward_arguments(model, example_input, keywords)

    with unchanged(model):
        if record.views is None:
            model(*args, **kwargs)  # the first forward finds the stages, and may be past one when it does
            record.recorder.excuse()
        output = model(*args, **kwargs)
        logits = logits_in(output)
        if logits is None:
            raise TypeError("the model returns no logits: no floating-point tensor is in its output")
        if not logits.numel():
            raise ValueError("report needs a batch of at least one image; the model's output for this one is empty")
        shows_loss = target is not None or (criterion.label_loss is None and _is_of_classes(logits))
        twin = criterion.twin(criterion.label_loss if shows_loss else _mean_of)
        twin.labels.sync = False
        labels = "on random labels" if target is None else "on the given target"
        features = record.take_features(logits if shows_loss else _mean_of(output))
        stages, pairs = _describe(twin, features)
        given: Callable[[Any], Any] = _mean_of
        if shows_loss:
            flat = criterion.label_loss is None and _classes_are_last(logits, features, twin.maps)
            given = _as_it_is
            if criterion.label_loss is None:
                given = _flattened if flat else _logits_of
            if flat and target is not None and target.shape[:2] == logits.shape[:2]:
                target = target.flatten(0, 1)
        if target is None and shows_loss:
            logits = given(logits)
            target = torch.randint(logits.shape[1], (len(logits), *logits.shape[2:])).to(logits.device)
        numbers = _some_numbers(twin.config.num_samples, logits)

        def step() -> None:
            twin(given(model(*args, **kwargs)), target, index=numbers).backward()

        def plain_step() -> None:
            with record.disable():
                step()

        costs = compare_steps({"plain": plain_step, "sfr": step}, logits.device, repeats)
    solver: str = twin.config.solver if twin.config.matching == "transport" else "none, nodes are matched in place"
    if solver == "auto":
        solver = f"auto ({default_solver(logits.device, twin.config.max_grid**2)} on {logits.device.type})"
    loss = replace(twin.last, weight=Ramp.of(twin.config.feature_weight).largest) if shows_loss else None
    gated, own = criterion.config.gate != "none" and criterion.label_loss is None, criterion.label_loss is not None
    notes = ([] if shows_loss else [NO_CLASSES]) + _left_out(criterion, record, features)
    return Report(stages, pairs, loss, solver, costs["plain"], costs["sfr"], gated, own, labels, tuple(notes))


def _left_out(criterion: Criterion, record: Record, features: Mapping[str, Tensor]) -> list[str]:
    """Return notes on the stages and pairs that have no part in it."""
    notes = [f"left out: {stage}" for stage in record.left_out]
    silent = [name for name in record.stage_names or () if name not in features]
    notes += [f"stage {name!r} did not run in this forward" for name in silent]
    if record.apart and isinstance(criterion.config.pairs, str):
        apart = ", ".join(sorted(" and ".join(sorted(pair)) for pair in record.apart))
        notes.append(f"left out: pairs of stages on different branches of the model: {apart}")
    return notes


def _is_of_classes(logits: Tensor) -> bool:
    """Whether random labels can be drawn: of fewer than two axes, or one column, there are none."""
    return logits.ndim > 1 and logits.shape[1] > 1


def _classes_are_last(logits: Tensor, features: Mapping[str, Tensor], maps: Maps) -> bool:
    """Whether logits have three axes and the classes on the last: as tokens of the same number have their channels."""
    layouts = {name: maps.view_of(name, feature).layout for name, feature in features.items()}
    tokens = [feature for name, feature in features.items() if layouts[name] in ("tokens", "sequence_first")]
    return logits.ndim == 3 and any(feature.shape[:2] == logits.shape[:2] for feature in tokens)


def _logits_of(output: Any) -> Tensor:
    """Return the logits in an output, as a loop that knows the model picks them."""
    logits = logits_in(output)
    assert logits is not None
    return logits


def _flattened(output: Any) -> Tensor:
    """Return the logits in an output, (B, N, K), with one row for each position, as such a loss takes them."""
    return _logits_of(output).flatten(0, 1)


def _as_it_is(output: Any) -> Any:
    return output


def _some_numbers(num_samples: int | None, logits: Tensor) -> Tensor | None:
    """Return numbers of samples as smoothing='past' needs them."""
    return None if num_samples is None else torch.arange(len(logits), device=logits.device) % num_samples


def _describe(criterion: Criterion, features: dict[str, Tensor]) -> tuple[tuple[StageRow, ...], tuple[PairRow, ...]]:
    stages = tuple(_stage_row(criterion, name, feature) for name, feature in features.items())
    return stages, tuple(map(_pair_row, criterion.pairs_of(features)))


def _stage_row(criterion: Criterion, name: str, feature: Tensor) -> StageRow:
    view, module = criterion.maps.view_of(name, feature), criterion.model.get_submodule(name)
    return StageRow(name, type(module).__name__, tuple(feature.shape), view.layout, view.prefix)


def _pair_row(pair: Pair) -> PairRow:
    shallow, deep = pair.nodes
    sizes, plans = (shallow.shape[1], deep.shape[1]), len(deep) // len(pair.finite)
    return PairRow(pair.shallow, pair.deep, sizes, deep.shape[2], plans)


def _mean_of(output: Any, _: Any = None) -> Tensor:
    """Return the mean over all floating-point tensors in a model's output."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().mean() for leaf in leaves]).mean()


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
