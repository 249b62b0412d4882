"""SFRConfig: every switch of the regularizer, with its default and where the default comes from."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

Pairs: TypeAlias = Literal["all", "last", "adjacent"]
Grouping: TypeAlias = Literal["segments", "mean", "crop"]
Layout: TypeAlias = Literal["auto", "channels_first", "channels_last", "tokens", "sequence_first", "vector"]
Cost: TypeAlias = Literal["cosine", "sqeuclidean", "correlation"]
Marginals: TypeAlias = Literal["uniform", "cross"]
Solver: TypeAlias = Literal["auto", "exact", "proximal", "sinkhorn"]
Smoothing: TypeAlias = Literal["class_mean", "past", "uniform", "none"]
Update: TypeAlias = Literal["running", "epoch"]
Reduction: TypeAlias = Literal["mean", "none"]

IGNORE_INDEX = -100  # that of F.cross_entropy
# Fields of the label term, and the kinds of smoothing that they have an effect on.
EFFECTIVE: dict[tuple[str, ...], tuple[Smoothing, ...]] = {
    ("alpha", "alpha_end", "alpha_steps"): ("class_mean", "past", "uniform"),
    ("momentum", "update"): ("class_mean",),
}
DEFAULT_ALPHA: dict[str, float] = {"class_mean": 0.5, "past": 0.5, "uniform": 0.1, "none": 0.0}


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Raise a ``ValueError`` naming `argument` unless `value` is one of the options of the ``Literal`` `choices`."""
    allowed = choices.__args__  # not get_args(), which torch.compile could not trace before torch 2.7
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_number(argument: str, value: object, low: float, high: float = float("inf"), *, whole: bool = False) -> None:
    """Raise unless `value` is a finite number (an integer if `whole`), of Python's or NumPy's, in [`low`, `high`]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        kind = "an integer" if whole else "a number"
        raise TypeError(f"{argument} must be {kind}; got {type(value).__name__} {value!r}")
    number: Any = value
    if not math.isfinite(number) or not low <= number <= high:
        allowed = f"lie in [{low}, {high}]" if math.isfinite(high) else f"be finite and at least {low}"
        raise ValueError(f"{argument} must {allowed}; got {value!r}")


def plain_number(value: Any) -> Any:
    """Return a number of NumPy's as one of Python's, which JSON can hold; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_num_samples(argument: str, mode: Smoothing, value: int | None) -> None:
    """Raise unless the number of training samples is given where, and only where, the label term needs it."""
    if (value is None) == (mode == "past"):
        raise ValueError(f"num_samples must be given for {argument}='past' and only then; got {value!r}")
    if value is not None:
        check_number("num_samples", value, 1, whole=True)


def check_effect(argument: str, smoothing: Smoothing, values: Mapping[str, Any]) -> None:
    """Raise if fields of the label term have another value than their default and no effect.

    Args:
        argument: what the kind of smoothing is called there.
        smoothing: its value.
        values: the fields by name.
    """
    given = [name for name, value in values.items() if value != getattr(SFRConfig, name)]
    idle = []
    for names, kinds in EFFECTIVE.items():
        useless = [name for name in names if name in given and smoothing not in kinds]
        if useless:
            idle.append(f"{', '.join(useless)} (of {argument}={' or '.join(map(repr, kinds))})")
    if idle:
        raise ValueError(f"without effect with {argument}={smoothing!r}, leave out: {'; '.join(idle)}")
    if values["alpha_end"] is None and "alpha_steps" in given:
        raise ValueError("without effect, leave out: alpha_steps (of alpha_end, to which alpha moves in these steps)")


def near_names(name: object, known: Iterable[str], count: int = 3) -> str:
    """Return the known names that are spelled most like this one, for an error; "" if there are none."""
    return ", ".join(map(repr, difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5)))


def check_alpha(alpha: float | Ramp | None, alpha_end: float | None, alpha_steps: int) -> None:
    """Raise if alpha leaves [0, 1], or is to move and it is not said how fast, or is said twice."""
    if isinstance(alpha, Ramp):
        if alpha_end is not None:
            raise ValueError("alpha_end has no effect beside alpha=Ramp(...), which says itself how alpha moves")
        for name in ("start", "end"):
            check_number(f"alpha: the {name} of the ramp", getattr(alpha, name), 0, 1)
    elif alpha is not None:
        check_number("alpha", alpha, 0, 1)
    if alpha_end is not None:
        check_number("alpha_end", alpha_end, 0, 1)
    if alpha_end is not None and alpha_end != alpha and alpha_steps == 1:
        raise ValueError(
            f"alpha_end={alpha_end!r} needs alpha_steps, the training steps over which alpha moves to it, at least 2: "
            "for a whole run the number of epochs times len(loader)"
        )


@dataclass(frozen=True)
class Ramp:
    """A number that moves linearly with the training step, and then stays.

    It is `start` for the first `after` steps, moves from there to `end` over `steps` steps, and stays at `end`. So it
    goes up (``Ramp(0, 0.2, 1000)``), down (``Ramp(0.2, 0, 10_000)``) or is cut off (``Ramp(0.2, 0, 1, after=5000)``).

    Args:
        start: first value, >= 0.
        end: last value, >= 0.
        steps: training steps that the move takes, >= 1.
        after: training steps before it, >= 0.

    Raises:
        TypeError, ValueError: naming the argument, the value got and what is allowed.

    Example:
        >>> weight = Ramp(0, 0.2, steps=4)
        >>> [round(weight.at(step), 2) for step in range(6)]
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        check_number("Ramp: start", self.start, 0)
        check_number("Ramp: end", self.end, 0)
        check_number("Ramp: steps", self.steps, 1, whole=True)
        check_number("Ramp: after", self.after, 0, whole=True)

    def at(self, step: int) -> float:
        """Return the value after `step` training steps."""
        return self.start + (self.end - self.start) * min(1.0, max(0, step - self.after) / self.steps)


@dataclass(frozen=True)
class SFRConfig:
    """Every switch of self-feature regularization.

    The loss is ``L_label + weight * min(1, step / warmup) * L_feature``. The method is that of Fan & Hou (arXiv
    2103.07350, withdrawn), of which only the abstract is known; what the abstract leaves open is *our reading*.

    Args:
        stages: names of the submodules to tap (a sequence), a regular expression that their full names match (a
            string), or None to discover them: the last output at each spatial resolution.
        layout: memory layout of the stage outputs: "channels_first" (B, C, ...), "channels_last" (B, ..., C), "tokens"
            (B, N, C), "sequence_first" (N, B, C) or "vector" (B, C); "auto" infers it from their shape and the layers.
        prefix_tokens: tokens in front of a sequence that are no local features (class, distillation, register tokens)
            and are dropped, >= 0; "auto" counts those beyond the map that the sequence comes from.
        weight: λ of the feature term, >= 0, or a :class:`Ramp`. With the default cost the term lies between 0 and 2
            on any network, and mostly below 1, so that 0.25 adds at most a quarter to the loss. 0 switches it off.
        warmup: training steps (calls of the criterion) over which λ rises linearly from 0, >= 0; not beside a ramp.
        pairs: which deep stage supervises which shallow one: "all" (every i < j, as Tf-FD), "last" (the deepest
            supervises all others, as BYOT), "adjacent", or a sequence of (shallow, deep), each a stage name or index.
        detach_deep: stop the gradient at the deep side, so that it supervises and is not dragged along.
        max_grid: the maps are average-pooled to at most ``max_grid`` cells along each spatial axis, >= 1.
        grouping: how many deep channels supervise few shallow ones: "segments" (one plan per segment), "mean" (one
            plan, on the mean of the segments), "crop" (the first channels only, as Tf-FD). Our
            reading.
        cost: ground cost between two local features: "cosine" (1 - cos; the scale of the features has no effect),
            "correlation" (1 - Pearson's r over the channels; nor has an offset), or "sqeuclidean" (mean over channels;
            it grows with the square of the activations, outweighs the labels of pretrained networks, and makes
            transformers diverge).
        marginals: mass of each local feature: "uniform" or "cross" (DeepEMD's cross-reference weights).
        solver: "exact" (on the CPU), "proximal" or "sinkhorn" (batched, on the device), "auto": exact for CPU tensors,
            proximal elsewhere.
        smoothing: label term: "none" (plain cross-entropy), "class_mean" (dynamic label smoothing: targets move towards
            what the network predicts for the class; for training long enough to fit the labels), "past" (towards what
            it predicted for the same sample when it last saw it, as PS-KD; the criterion then needs `index`), or
            "uniform".
        num_samples: samples of the training set, >= 1; for "past", which needs it, and for nothing else.
        alpha: weight of the smoothing distribution in the target, in [0, 1], or a :class:`Ramp`. None means 0.5 for
            "class_mean" (Zhang et al., arXiv 2011.12562) and "past", 0.1 for "uniform"; with "class_mean" soft targets
            (MixUp, CutMix) are smoothed only if `alpha` or `alpha_end` is given.
        alpha_end, alpha_steps: another way to write ``alpha=Ramp(alpha, alpha_end, alpha_steps)``; both or neither.
        momentum: weight of one sample in the running class means, in (0, 1]. 0.01 averages over about 100 samples.
        update: "running" (class means move at every step) or "epoch" (Zhang et al.; call ``criterion.end_epoch()``).
        ignore_index: class index that marks a label to be left out of the label term; -100, as ``F.cross_entropy``.

    Raises:
        TypeError, ValueError: naming the field, the value got and what is allowed, or fields of the label term that
            have no effect with this `smoothing`.

    Example:
        >>> SFRConfig(weight=0.1, pairs="last").weight
        0.1
    """

    stages: str | Sequence[str] | None = None
    layout: Layout = "auto"
    prefix_tokens: int | Literal["auto"] = "auto"
    weight: float | Ramp = 0.25
    warmup: int = 0
    pairs: Pairs | Sequence[tuple[int | str, int | str]] = "all"
    detach_deep: bool = True
    max_grid: int = 4
    grouping: Grouping = "mean"
    cost: Cost = "cosine"
    marginals: Marginals = "uniform"
    solver: Solver = "auto"
    smoothing: Smoothing = "none"
    num_samples: int | None = None
    alpha: float | Ramp | None = None
    alpha_end: float | None = None
    alpha_steps: int = 1
    momentum: float = 0.01
    update: Update = "running"
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        for field in fields(self):
            self._freeze(field.name, plain_number(getattr(self, field.name)))
        check_choice("layout", self.layout, Layout)
        check_choice("grouping", self.grouping, Grouping)
        check_choice("cost", self.cost, Cost)
        check_choice("marginals", self.marginals, Marginals)
        check_choice("solver", self.solver, Solver)
        check_choice("smoothing", self.smoothing, Smoothing)
        check_choice("update", self.update, Update)
        if self.prefix_tokens != "auto":
            check_number("prefix_tokens", self.prefix_tokens, 0, whole=True)
        self._check_weight()
        check_number("max_grid", self.max_grid, 1, whole=True)
        check_number("alpha_steps", self.alpha_steps, 1, whole=True)
        check_number("momentum", self.momentum, 1e-6, 1)
        check_number("ignore_index", self.ignore_index, -(2**63), 2**63 - 1, whole=True)
        check_num_samples("smoothing", self.smoothing, self.num_samples)
        if isinstance(self.alpha, Mapping):  # a ramp that went through JSON
            self._freeze("alpha", Ramp(**self.alpha))
        check_alpha(self.alpha, self.alpha_end, self.alpha_steps)
        check_effect("smoothing", self.smoothing, {name: getattr(self, name) for names in EFFECTIVE for name in names})
        if not isinstance(self.detach_deep, bool):
            raise TypeError(f"detach_deep must be a bool; got {self.detach_deep!r}")
        if isinstance(self.pairs, str):
            check_choice("pairs", self.pairs, Pairs)
        else:
            self._freeze("pairs", tuple(_pair(pair) for pair in _items("pairs", self.pairs)))
            if not self.pairs:
                raise ValueError("pairs must hold at least one (shallow, deep) pair; got an empty sequence")
        if self.stages is not None and not isinstance(self.stages, str):
            stages = _items("stages", self.stages)
            if not all(isinstance(name, str) for name in stages):
                raise TypeError(f"stages must be names, a regular expression or None; got {self.stages!r}")
            self._freeze("stages", stages)

    def _check_weight(self) -> None:
        check_number("warmup", self.warmup, 0, whole=True)
        if isinstance(self.weight, Mapping):  # a ramp that went through JSON
            self._freeze("weight", Ramp(**self.weight))
        if not isinstance(self.weight, Ramp):
            check_number("weight", self.weight, 0)
        elif self.warmup:
            raise ValueError("warmup has no effect beside weight=Ramp(...), which says itself how the weight rises")

    def weight_at(self, step: int) -> float:
        """Return λ of training step `step`, counted from 1."""
        if isinstance(self.weight, Ramp):
            return self.weight.at(step)
        return self.weight * (min(1.0, step / self.warmup) if self.warmup else 1.0)

    @property
    def largest_weight(self) -> float:
        """The largest λ of a training."""
        return max(self.weight.start, self.weight.end) if isinstance(self.weight, Ramp) else self.weight

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SFRConfig:
        """Build a configuration from :meth:`to_dict`'s result, also after a round trip through JSON.

        Raises:
            ValueError: if a key is no field.
        """
        message = no_such_field(values)
        if message:
            raise ValueError(f"SFRConfig has no field {message}")
        return cls(**values)


def no_such_field(names: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return what to say of the names that are no fields of :class:`SFRConfig`, nor among `also`; "" if all are."""
    known = [*(field.name for field in fields(SFRConfig)), *also]
    unknown = [name for name in names if name not in known]
    near = ", ".join(filter(None, (near_names(name, known) for name in unknown)))
    hint = f"the near names {near}" if near else ", ".join(map(repr, known))
    return f"{unknown}; it has {hint}" if unknown else ""


def _items(argument: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a sequence or a string; got {type(value).__name__} {value!r}")
    return tuple(value)


def _pair(pair: object) -> tuple[int | str, int | str]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"pairs must be (shallow, deep) pairs of stage names or indices; got {pair!r}")
    for stage in pair:
        if not isinstance(stage, (numbers.Integral, str)) or isinstance(stage, bool):
            raise TypeError(f"pairs must name stages by name or index; got {stage!r}")
    return plain_number(pair[0]), plain_number(pair[1])
