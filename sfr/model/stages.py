"""Looks stages up by name or regular expression, infers their layout, and resolves pairs of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sfr.checks import near_names
from sfr.config import Layout
from sfr.model.formats import Shaped

HOW_TO_NAME = (
    "Name at least two submodules whose outputs are levels of the feature hierarchy, as in "
    "SFRWrapper(model, stages=['layer1', 'layer2', 'layer3']), or give a regular expression of their names; "
    "the names are those of model.named_modules()."
)


def find_stages(model: nn.Module, stages: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules called for, by name.

    Args:
        model: the plain model.
        stages: full names of submodules, or one regular expression that full names must match.

    Raises:
        ValueError: for an unknown or repeated name (listing the near ones), a bad expression, or fewer than two
            stages.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(stages, str):
        try:
            pattern = re.compile(stages)
        except re.error as error:
            raise ValueError(f"stages={stages!r} is no regular expression: {error}") from error
        found = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        inside = [name for name in modules if re.fullmatch(rf".*\.(?:{stages})", name)] if len(found) < 2 else []
        if inside:
            more = ", ..." if len(inside) > 5 else ""
            raise ValueError(
                f"stages={stages!r} gives {len(found)} stage(s), two are needed. Full names are matched, and these end "
                f"so: {', '.join(inside[:5])}{more}; stages=r'.*\\.(?:{stages})' matches them"
            )
    else:
        everything = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        for name in stages:
            if name in everything and name not in modules:
                first = next(other for other, module in modules.items() if module is everything[name])
                raise ValueError(f"stage {name!r} is the very module {first!r}, and a shared module cannot be a stage")
            if name not in modules:
                near = near_names(name, modules, 5) or ", ".join(map(repr, list(modules)[:10]))
                raise ValueError(f"the model has no stage {name!r}; near names: {near}")
        repeated = [name for name, count in Counter(stages).items() if count > 1]
        if repeated:
            raise ValueError(f"stages must not be repeated; got {repeated} more than once")
        found = {name: modules[name] for name in stages}
    for name, module in found.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"stage {name!r} is a ScriptModule, which takes no hooks: name a module around it, or wrap the model "
                "before it is scripted"
            )
    if len(found) < 2:
        raise ValueError(f"stages={stages!r} gives {len(found)} stage(s), two are needed. {HOW_TO_NAME}")
    return found


def infer_layout(stage: nn.Module, feature: Shaped, layer: nn.Module | None = None) -> Layout:
    """Return the layout of a stage's output, from its shape and the layers of the stage.

    Two axes are a vector. Else the channels are the axis that is as long as the last convolution or linear map is
    wide. If both or neither are, a stage with a convolution, or with none of the layers that work on the last axis
    (Linear, LayerNorm), has channels first; any other has tokens (three axes) or channels last.

    Args:
        stage: the submodule.
        feature: its output.
        layer: the last layer that ran before the output, where known; it speaks for a stage that holds none.

    Raises:
        ValueError: if the shape is no known layout.
    """
    if feature.ndim == 2:
        return "vector"
    if not 3 <= feature.ndim <= 5:
        raise ValueError(
            f"has shape {tuple(feature.shape)}, which is no known layout: (B, C), (B, N, C), or channels first or last "
            "with up to three spatial axes; tap a submodule with such an output, with stages=[...]"
        )
    last_axis: Layout = "tokens" if feature.ndim == 3 else "channels_last"
    layers: list[nn.Module] = [
        module for module in stage.modules() if isinstance(module, (_ConvNd, nn.Linear, nn.LayerNorm))
    ]
    if not layers and layer is not None:
        layers = [layer]
    wide = [module for module in (*layers, layer) if isinstance(module, (_ConvNd, nn.Linear))]
    if wide:
        width = wide[-1].out_channels if isinstance(wide[-1], _ConvNd) else wide[-1].out_features
        fits = feature.shape[1] == width, feature.shape[-1] == width
        if fits[0] != fits[1]:
            return "channels_first" if fits[0] else last_axis
    convolutional = any(isinstance(module, _ConvNd) for module in layers)
    linear = any(isinstance(module, (nn.Linear, nn.LayerNorm)) for module in layers)
    return "channels_first" if convolutional or (feature.ndim > 3 and not linear) else last_axis


def check_batches(outputs: Mapping[str, tuple[tuple[int, ...], Layout]], batch: int | None) -> None:
    """Raise a ``ValueError`` unless all stages are of one batch, and of that of the logits.

    Stages may also be of a multiple of it (a model that folds frames or crops into the batch) or of a part (logits
    flattened over positions).

    Args:
        outputs: shape and layout of the output of each stage, by name.
        batch: length of the first axis of the logits; None if that is not known to be the batch.
    """
    sizes = {}
    for name, (shape, layout) in outputs.items():
        axis = int(layout == "sequence_first")
        size = sizes[name] = shape[axis]
        if batch is None or size == batch or (size == 1 and not axis):
            continue
        if len(shape) == 3 and shape[1 - axis] == batch:
            raise ValueError(f"stage {name!r} {swapped_axes(shape, batch, layout)}")
        if not size or not batch or (size % batch and batch % size):
            raise ValueError(
                f"stage {name!r} has shape {shape}, read as {layout!r} of a batch of {size}, but the logits are of a "
                f"batch of {batch}: tap a module whose output is for the whole batch, with stages=[...]. If the logits "
                "were picked out of the batch, pass all of them, and let a loss of your own pick: "
                "label_loss=lambda logits, target: F.cross_entropy(logits[picked], target[picked])"
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the stages are of different batches: {', '.join(f'{name!r} of {size}' for name, size in sizes.items())}. "
            "Tap modules whose outputs are all for the whole batch, with stages=[...]"
        )


def swapped_axes(shape: Sequence[int], batch: int, layout: Layout) -> str:
    """Return what to say of an output whose batch, of this length, is not on the axis where its layout has it."""
    is_axis, other = ("first", "tokens") if layout == "sequence_first" else ("second", "sequence_first")
    return (
        f"has shape {tuple(shape)}, and the batch of {batch} is its {is_axis} axis: state layout={other!r}, or tap "
        "another module, with stages=[...]"
    )
