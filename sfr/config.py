"""SFRConfig: every switch of the loss, with its default and where the default comes from."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, TypedDict

from sfr.checks import check_choice, check_number, items, near_names, plain_number
from sfr.label_switches import (
    DEFAULT_ALPHA,
    EFFECTIVE,
    Smoothing,
    Update,
    check_alpha,
    check_early_learning,
    check_effect,
    check_momentum,
    check_num_samples,
)
from sfr.old_names import OLD_NAMES, current_names, near_old_names
from sfr.ramp import Ramp
from sfr.warn import deprecated

__all__ = ["DEFAULT_ALPHA", "Ramp", "SFRConfig"]

Pairs: TypeAlias = Literal["all", "last", "adjacent"]
Stage: TypeAlias = int | float | str  # of a pair: index, depth or name
Grouping: TypeAlias = Literal["segments", "mean", "crop"]
Layout: TypeAlias = Literal["auto", "channels_first", "channels_last", "tokens", "sequence_first", "vector"]
Cost: TypeAlias = Literal["cosine", "sqeuclidean", "correlation"]
Marginals: TypeAlias = Literal["uniform", "cross"]
Matching: TypeAlias = Literal["transport", "in_place"]
Solver: TypeAlias = Literal["auto", "exact", "proximal", "sinkhorn"]
Gate: TypeAlias = Literal["fitted", "none"]
Reduction: TypeAlias = Literal["mean", "none"]
Preset: TypeAlias = Literal["few-labels", "noisy-labels"]

IGNORE_INDEX = -100  # that of F.cross_entropy


class Switches(TypedDict, total=False):
    """The fields of :class:`SFRConfig` as keyword arguments, for editors and type checkers."""

    feature_weight: float | Ramp
    gate: Gate
    pairs: Pairs | Sequence[tuple[Stage, Stage]]
    detach_deep: bool
    max_grid: int
    grouping: Grouping
    cost: Cost
    matching: Matching
    marginals: Marginals
    solver: Solver
    smoothing: Smoothing
    num_samples: int | None
    alpha: float | Ramp | None
    momentum: float | None
    update: Update
    early_learning: float | Ramp
    ignore_index: int


@dataclass(frozen=True)
class SFRConfig:
    """Every switch of the loss, ``L_label + feature_weight * L_feature``; how the model is read is the wrapper's.

    The method is that of Fan & Hou (arXiv 2103.07350, withdrawn), of which only the abstract is known; what the
    abstract leaves open is *our reading*.

    Args:
        feature_weight: λ of the feature term, >= 0, or a :class:`Ramp`. With the default cost the term lies between 0
            and 2 on any network, and mostly below 1, so that 0.25 adds at most a quarter to the loss. 0 switches it
            off.
        gate: "fitted": the feature term of an image counts as far as its labels are fitted, by the square of the
            probability that the network gives to them, so that a network that does not know them yet learns them
            first; "none": it counts in full, as it does beside a loss of your own. Our reading.
        pairs: which deep stage supervises which shallow one: "all" (every i < j, as Tf-FD), "last" (the deepest
            supervises all others, as BYOT), "adjacent", or a sequence of (shallow, deep), each a stage's name, its
            index, or its depth as a float above 0 and up to 1: of n stages the first lies at 1 / n, the last at 1.
        detach_deep: stop the gradient at the deep side, so that it supervises and is not dragged along.
        max_grid: the maps are average-pooled to at most ``max_grid`` cells along each spatial axis, >= 1.
        grouping: how many deep channels supervise few shallow ones: "segments" (one plan per segment), "mean" (one
            plan, on the mean of the segments), "crop" (the first channels only, as Tf-FD). Our
            reading.
        cost: ground cost between two local features: "cosine" (1 - cos; the scale of the features has no effect),
            "correlation" (1 - Pearson's r over the channels; nor has an offset), or "sqeuclidean" (mean over channels;
            it grows with the square of the activations, outweighs the labels of pretrained networks, and makes
            transformers diverge).
        matching: "transport": an optimal plan says which deep feature supervises which shallow one; "in_place": each
            supervises the one at its own place, as LayerSync (arXiv 2510.12581) does.
        marginals: mass of each local feature: "uniform" or "cross" (DeepEMD's cross-reference weights).
        solver: "exact" (on the CPU), "proximal" or "sinkhorn" (batched, on the device), "auto": exact for CPU tensors,
            proximal elsewhere (exact for small grids where Triton does not run).
        smoothing: label term: "none" (plain cross-entropy), "class_mean" (dynamic label smoothing: targets move towards
            what the network predicts for the class; for training long enough to fit the labels), "past" (towards what
            it predicted for the same sample when it last saw it, as PS-KD; the criterion then needs `index`), or
            "uniform".
        num_samples: samples of the training set, >= 1; for "past", which needs it, and for nothing else.
        alpha: weight of the smoothing distribution in the target, in [0, 1], or a :class:`Ramp`. None means 0.5 for
            "class_mean" (Zhang et al., arXiv 2011.12562) and "past", 0.1 for "uniform"; with "class_mean" soft targets
            (MixUp, CutMix) are smoothed only if `alpha` is given.
        momentum: weight of the newest in a running mean, in (0, 1]: of one sample in the class means, where None means
            0.01, about the last 100 samples; of the newest prediction for a sample with "past", where None means 1,
            the last alone, and less is temporal ensembling (Laine & Aila, arXiv 1610.02242). With `early_learning` it
            must be less than 1, and None means 0.3.
        update: "running" (class means move at every step) or "epoch" (Zhang et al.; call ``criterion.end_epoch()``).
        early_learning: weight, >= 0, of the mean of log(1 - <t, p>) beside the label term of "past", where t is the
            running mean of what the network predicted for a sample and p what it predicts now (ELR: Liu et al., arXiv
            2007.00151, with 3 for ten classes and 7 for a hundred; of K < 10 classes it counts by (K - 1) / 9, our
            reading): against the learning of wrong labels.
        ignore_index: class index that marks a label to be left out of the label term; -100, as ``F.cross_entropy``.

    Raises:
        TypeError, ValueError: naming the field, the value got and what is allowed, or fields of the label term that
            have no effect with this `smoothing`.

    Example:
        >>> SFRConfig(feature_weight=0.1, pairs="last").feature_weight
        0.1
    """

    feature_weight: float | Ramp = 0.25
    gate: Gate = "fitted"
    pairs: Pairs | Sequence[tuple[Stage, Stage]] = "all"
    detach_deep: bool = True
    max_grid: int = 4
    grouping: Grouping = "mean"
    cost: Cost = "cosine"
    matching: Matching = "transport"
    marginals: Marginals = "uniform"
    solver: Solver = "auto"
    smoothing: Smoothing = "none"
    num_samples: int | None = None
    alpha: float | Ramp | None = None
    momentum: float | None = None
    update: Update = "running"
    early_learning: float | Ramp = 0.0
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        for field in fields(self):
            self._freeze(field.name, plain_number(getattr(self, field.name)))
        check_choice("gate", self.gate, Gate)
        check_choice("grouping", self.grouping, Grouping)
        check_choice("cost", self.cost, Cost)
        check_choice("matching", self.matching, Matching)
        check_choice("marginals", self.marginals, Marginals)
        check_choice("solver", self.solver, Solver)
        check_choice("smoothing", self.smoothing, Smoothing)
        check_choice("update", self.update, Update)
        idle = [name for name in ("marginals", "solver") if getattr(self, name) != getattr(SFRConfig, name)]
        if self.matching == "in_place" and idle:
            raise ValueError(f"without effect with matching='in_place', which solves no transport: {', '.join(idle)}")
        for name in ("feature_weight", "alpha", "early_learning"):
            if isinstance(getattr(self, name), Mapping):  # a ramp that went through JSON
                self._freeze(name, Ramp(**getattr(self, name)))
        if not isinstance(self.feature_weight, Ramp):
            check_number("feature_weight", self.feature_weight, 0)
        check_number("max_grid", self.max_grid, 1, whole=True)
        check_momentum(self.momentum)
        check_number("ignore_index", self.ignore_index, -(2**63), 2**63 - 1, whole=True)
        check_num_samples("smoothing", self.smoothing, self.num_samples)
        check_alpha(self.alpha)
        check_early_learning(self.early_learning, self.momentum)
        check_effect("smoothing", self.smoothing, {name: getattr(self, name) for name in EFFECTIVE})
        if not isinstance(self.detach_deep, bool):
            raise TypeError(f"detach_deep must be a bool; got {self.detach_deep!r}")
        if isinstance(self.pairs, str):
            check_choice("pairs", self.pairs, Pairs)
        else:
            self._freeze("pairs", tuple(_pair(pair) for pair in items("pairs", self.pairs)))
            if not self.pairs:
                raise ValueError("pairs must hold at least one (shallow, deep) pair; got an empty sequence")

    @classmethod
    def preset(cls, purpose: Preset, **arguments: Any) -> SFRConfig:
        """Return the configuration for a purpose, "few-labels" or "noisy-labels"; see :func:`sfr.presets.preset`."""
        from sfr.presets import preset

        return preset(purpose, **arguments)

    def weight_at(self, step: int) -> float:
        """Return λ of training step `step`, counted from 1."""
        return self.feature_weight.at(step) if isinstance(self.feature_weight, Ramp) else self.feature_weight

    def of_pairs(self) -> dict[str, Any]:
        """Return the switches that :func:`sfr.feature.term.matched_pairs` takes."""
        names = ("pairs", "max_grid", "grouping", "detach_deep", "cost", "matching")
        return {name: getattr(self, name) for name in names}

    def of_terms(self) -> dict[str, Any]:
        """Return the switches that :func:`sfr.feature.term.feature_terms` takes."""
        return self.of_pairs() | {"marginals": self.marginals, "solver": self.solver}

    def of_labels(self) -> dict[str, Any]:
        """Return the switches that :class:`sfr.DynamicLabelSmoothing` takes."""
        names = (*EFFECTIVE, "ignore_index", "num_samples")
        return {"mode": self.smoothing} | {name: getattr(self, name) for name in names}

    def without_label_term(self) -> SFRConfig:
        """Return a configuration that goes with a loss of the user's own: what belongs to the label term is unset."""
        names = ("smoothing", "num_samples", "ignore_index", *EFFECTIVE)
        return replace(self, **{name: getattr(SFRConfig, name) for name in names})

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SFRConfig:
        """Build a configuration from :meth:`to_dict`'s result, also after a round trip through JSON.

        Names of before 0.2 (``weight``, ``warmup``, ``alpha_end``, ``alpha_steps``) are read, too.

        Raises:
            ValueError: if a key is no field, or one of the wrapper's that is not at its default.
        """
        switches = todays_switches(values)
        message = no_such_field(switches)
        if message:
            raise ValueError(f"SFRConfig has no field {message}")
        return cls(**switches)


def todays_switches(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return switches under today's names, given those of before 0.2; see :func:`sfr.old_names.current_names`."""
    return current_names(values, SFRConfig.feature_weight, DEFAULT_ALPHA)


def _take_old_names(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: SFRConfig, *args: Any, **switches: Any) -> None:
        old = [name for name in switches if name in OLD_NAMES]
        if old:
            deprecated("SFRConfig", {name: OLD_NAMES[name] for name in old})
            switches = todays_switches(switches)
        init(self, *args, **switches)

    return __init__


SFRConfig.__init__ = _take_old_names(SFRConfig.__init__)  # type: ignore[method-assign]


def no_such_field(names: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return what to say of the names that are no fields of :class:`SFRConfig`, nor among `also`; "" if all are."""
    known = [*(field.name for field in fields(SFRConfig)), *also]
    unknown = [name for name in names if name not in known]
    near = ", ".join(filter(None, (near_names(name, known) or near_old_names(name) for name in unknown)))
    hint = f"the near names {near}" if near else ", ".join(map(repr, known))
    return f"{unknown}; it has {hint}" if unknown else ""


def _pair(pair: object) -> tuple[Stage, Stage]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"pairs must be (shallow, deep) pairs of stage names, indices or depths; got {pair!r}")
    for stage in pair:
        if not isinstance(stage, (numbers.Real, str)) or isinstance(stage, bool):
            raise TypeError(f"pairs must name stages by name, index or depth; got {stage!r}")
        if not isinstance(stage, (numbers.Integral, str)) and not 0 < float(stage) <= 1:
            raise ValueError(f"pairs must name depths above 0 and up to 1; got {stage!r}")
    return plain_number(pair[0]), plain_number(pair[1])
