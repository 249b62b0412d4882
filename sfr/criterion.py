"""SFRLoss: label term + weight(t) * feature term, in the place of nn.CrossEntropyLoss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfr.config import Layout, SFRConfig
from sfr.labels import DynamicLabelSmoothing, checked_target
from sfr.losses import emd_l2
from sfr.nodes import Grid, common_grids, match_channels, spatial_shape, to_nodes
from sfr.stages import infer_layout, resolve_pairs
from sfr.wrapper import SFRWrapper

# How often the flag of non-finite features is read where that makes the host wait for the device.
CHECK_EVERY = 100


@dataclass(frozen=True)
class LossParts:
    """The parts of one training loss, ``label + weight * feature``, detached and on their device.

    Args:
        label: the label term, 0-d.
        feature: the feature term before weighting, 0-d; zero where the weight is zero.
        weight: λ of this step.
        pairs: the feature term of each pair, by "shallow <- deep".
    """

    label: Tensor
    feature: Tensor
    weight: float
    pairs: dict[str, Tensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """Return label, feature and weight as floats for a log; waits for the device."""
        return {"label": self.label.item(), "feature": self.feature.item(), "weight": self.weight}


class SFRLoss(nn.Module):
    r"""The criterion of self-feature regularization; takes the place of ``nn.CrossEntropyLoss()``.

    .. math:: L = L_\text{label} + \lambda \min(1, t / \text{warmup}) \, L_\text{feature}

    The feature term is the mean over the (shallow, deep) pairs of :func:`sfr.emd_l2` between their nodes, the label
    term :class:`sfr.DynamicLabelSmoothing`; both are configured by the wrapper's :class:`sfr.SFRConfig`. The state
    (steps, label statistics) is in ``state_dict()``, so that a run resumes exactly
    (Accelerate: ``accelerator.register_for_checkpointing(criterion)``).

    In ``criterion.eval()``, under ``torch.no_grad()`` and inside ``model.disable()`` it is the plain cross-entropy,
    for a validation loss that compares with other methods.

    A sample whose features are not finite has a feature term of zero, with one warning; training goes on.

    Args:
        model: the :class:`sfr.SFRWrapper`, also inside DDP or ``torch.compile``.

    Raises:
        TypeError: if `model` holds no :class:`sfr.SFRWrapper`.

    Example:
        >>> model = SFRWrapper(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, 2), nn.AdaptiveAvgPool2d(1),
        ...                                  nn.Flatten()))
        >>> criterion = SFRLoss(model)
        >>> criterion(model(torch.randn(2, 3, 16, 16)), torch.tensor([3, 7])).backward()
        >>> sorted(criterion.last.as_dict())
        ['feature', 'label', 'weight']
    """

    _model: SFRWrapper
    _nonfinite: Tensor | None
    config: SFRConfig

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: the criterion does not own the model's parameters.
        object.__setattr__(self, "_model", _wrapper_in(model))
        config = self._model.sfr_config
        self.config = config
        self.labels = DynamicLabelSmoothing(
            mode=config.smoothing,
            alpha=config.alpha,
            alpha_end=config.alpha_end,
            alpha_steps=config.alpha_steps,
            momentum=config.momentum,
            update=config.update,
        )
        self.step = 0
        self.last: LossParts | None = None
        self._layouts: dict[str, Layout] = {}
        self._nonfinite = None
        self._warned = False

    @property
    def model(self) -> SFRWrapper:
        """The wrapped model whose features the criterion uses."""
        return self._model

    def current_weight(self) -> float:
        """Return λ of the step under way or, between steps, of the last one."""
        warmup = self.config.warmup
        return self.config.weight * (min(1.0, self.step / warmup) if warmup else 1.0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one batch as a 0-d tensor.

        Args:
            logits: output of the wrapped model for this batch, shape (B, K).
            target: class indices, shape (B,), or soft targets, shape (B, K).

        Raises:
            RuntimeError: if the features recorded are not those of the forward that gave the logits.
            TypeError, ValueError: for logits or targets of the wrong kind, shape or range.
        """
        if not self.training or not torch.is_grad_enabled() or self._model.disabled:
            return F.cross_entropy(logits, checked_target(logits, target))
        features = self._model.take_features(logits)
        label = self.labels(logits, target)
        self.step += 1
        weight = self.current_weight()
        if weight == 0:
            self.last = LossParts(label.detach(), torch.zeros_like(label.detach()), weight)
            return label
        pairs = self._feature_terms(features)
        feature = torch.stack(list(pairs.values())).mean()
        self.last = LossParts(
            label.detach(), feature.detach(), weight, {name: term.detach() for name, term in pairs.items()}
        )
        return label + weight * feature

    def end_epoch(self) -> None:
        """Take over the class means of the epoch; needed with ``update="epoch"`` only."""
        self.labels.end_epoch()

    def layout_of(self, name: str, feature: Tensor) -> Layout:
        """Return the layout of a stage's output: the one stated in the configuration, or else inferred."""
        if self.config.layout != "auto":
            return self.config.layout
        if name not in self._layouts:
            try:
                self._layouts[name] = infer_layout(self._model.stage(name), feature)
            except ValueError as error:
                raise ValueError(f"stage {name!r} {error}") from None
        return self._layouts[name]

    def _feature_terms(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the feature term of every pair."""
        config, names = self.config, list(features)
        layouts = {name: self.layout_of(name, feature) for name, feature in features.items()}
        shapes = {name: spatial_shape(feature, layouts[name]) for name, feature in features.items()}
        pooled: dict[tuple[str, Grid], tuple[Tensor, Tensor]] = {}

        def nodes_of(name: str, grid: Grid) -> tuple[Tensor, Tensor]:
            if (name, grid) not in pooled:
                pooled[name, grid] = self._finite(to_nodes(features[name], layouts[name], grid))
            return pooled[name, grid]

        terms = {}
        for i, j in resolve_pairs(config.pairs, names):
            grids = common_grids(shapes[names[i]], shapes[names[j]], config.max_grid)
            shallow, shallow_finite = nodes_of(names[i], grids[0])
            deep, deep_finite = nodes_of(names[j], grids[1])
            if config.detach_deep:
                deep = deep.detach()
            values = emd_l2(
                *match_channels(shallow, deep, config.grouping, sync=self.labels.sync),
                cost=config.cost,
                marginals=config.marginals,
                solver=config.solver,
                reduction="none",
            )
            per_image = values.reshape(len(shallow), -1).mean(dim=1)
            terms[f"{names[i]} <- {names[j]}"] = (per_image * (shallow_finite & deep_finite)).mean()
        self._warn_once()
        return terms

    def _finite(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Zero the nodes of images that hold a non-finite value; return them and which images are sound."""
        finite = nodes.isfinite().all(dim=2).all(dim=1)
        if not self._warned:
            found = ~finite.detach().all()
            self._nonfinite = found if self._nonfinite is None else self._nonfinite | found
        return torch.where(finite[:, None, None], nodes, 0.0), finite

    def _warn_once(self) -> None:
        flag = self._nonfinite
        if flag is None or (flag.device.type != "cpu" and self.step % CHECK_EVERY):
            return
        self._nonfinite = None
        if flag:
            self._warned = True
            warnings.warn(
                f"non-finite features at or before step {self.step}: their images get a feature term of zero. "
                "Look at the learning rate and, with float16, at the loss scale.",
                stacklevel=4,
            )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step; called by ``state_dict``."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the step; called by ``load_state_dict``."""
        self.step = state["step"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None, "_nonfinite": None}


def _wrapper_in(model: object) -> SFRWrapper:
    """Return the SFRWrapper that `model` is, or that DDP, FSDP or torch.compile hold."""
    inner: Any = model
    while inner is not None and not isinstance(inner, SFRWrapper):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
    if inner is None:
        raise TypeError(f"SFRLoss needs an SFRWrapper: model = sfr.SFRWrapper(model); got {type(model).__name__}")
    return inner
