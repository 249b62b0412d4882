"""Which axis of an output is which: the layout is inferred from the layers, and the batch checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sfr.config import Layout
from sfr.model.formats import Grid, Shaped, View


def infer_layout(stage: nn.Module, feature: Shaped, layer: nn.Module | None = None, grid: Grid | None = None) -> Layout:
    """Return the layout of a stage's output, from its shape and the layers of the stage.

    An output with two axes is a vector. Right after a convolution the map of that one shows where the spatial axes are:
    the width would not, of an output that joins what came in with what the convolution made of it (DenseNet). Otherwise
    the channels are the axis, second or last, whose length is the width of the last convolution or linear layer. If
    both or neither fit, or the last axis alone in a map of convolutions, a stage with a convolution, or without layers
    that work on the last axis (Linear, LayerNorm), has channels first; any other has tokens (three axes) or channels
    last.

    Args:
        stage: the submodule.
        feature: its output.
        layer: the last layer that ran before the output, if known; used if the stage has no layer itself.
        grid: size of the map that `layer` returned, if known.

    Raises:
        ValueError: if the shape fits no layout.
    """
    if feature.ndim == 2:
        return "vector"
    if not 3 <= feature.ndim <= 5:
        raise ValueError(
            f"has shape {tuple(feature.shape)}, which fits no layout: (B, C), (B, N, C), or channels first or last "
            "with up to three spatial axes; tap a submodule with such an output, with stages=[...]"
        )
    last_axis: Layout = "tokens" if feature.ndim == 3 else "channels_last"
    if grid and isinstance(layer, _ConvNd):
        joined = tuple(feature.shape[2:]) == grid and feature.shape[1] >= layer.out_channels
        permuted = tuple(feature.shape[1:-1]) == grid and feature.shape[-1] == layer.out_channels
        if joined != permuted:
            return "channels_first" if joined else last_axis
    layers: list[nn.Module] = [
        module for module in stage.modules() if isinstance(module, (_ConvNd, nn.Linear, nn.LayerNorm))
    ]
    if not layers and layer is not None:
        layers = [layer]
    convolutional = any(isinstance(module, _ConvNd) for module in layers)
    linear = any(isinstance(module, (nn.Linear, nn.LayerNorm)) for module in layers)
    wide = [module for module in (*layers, layer) if isinstance(module, (_ConvNd, nn.Linear))]
    if wide:
        width = wide[-1].out_channels if isinstance(wide[-1], _ConvNd) else wide[-1].out_features
        fits = feature.shape[1] == width, feature.shape[-1] == width
        if fits[0] != fits[1] and (fits[0] or linear or feature.ndim == 3):
            return "channels_first" if fits[0] else last_axis
    return "channels_first" if convolutional or (feature.ndim > 3 and not linear) else last_axis


def check_batches(outputs: Mapping[str, tuple[tuple[int, ...], View]], batch: int | None) -> None:
    """Raise a ``ValueError`` unless all stages have the same batch size, and the logits fit it.

    A stage may have a multiple of the logits' batch size (a model that folds frames or crops into the batch) or a
    fraction of it (logits flattened over positions).

    Args:
        outputs: shape of the output of each stage, and how it is read, by name.
        batch: length of the first axis of the logits; None if that is not known to be the batch.
    """
    sizes = {}
    for name, (shape, view) in outputs.items():
        axis, layout = view.batch_axis, view.layout
        size = sizes[name] = shape[axis]
        if batch is None or size == batch or (size == 1 and not axis):
            continue
        if len(shape) == 3 and shape[1 - axis] == batch:
            raise ValueError(f"stage {name!r} {swapped_axes(shape, batch, layout)}")
        if not size or not batch or (size % batch and batch % size):
            raise ValueError(
                f"stage {name!r} has shape {shape}, read as {layout!r} with a batch of {size}, but the logits have a "
                f"batch of {batch}: tap a module whose output is for the whole batch, with stages=[...]. If the logits "
                "were picked out of several for each sample, pass all of them, and let a loss of your own pick: "
                "label_loss=lambda logits, target: F.cross_entropy(logits[picked], target[picked])"
            )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the stages have different batch sizes: {', '.join(f'{name!r} {size}' for name, size in sizes.items())}. "
            "Tap modules whose outputs are all for the whole batch, with stages=[...]"
        )


def swapped_axes(shape: Sequence[int], batch: int, layout: Layout) -> str:
    """Return the message for an output whose batch, of this length, is not on the axis that its layout says."""
    is_axis, other = ("first", "tokens") if layout == "sequence_first" else ("second", "sequence_first")
    return (
        f"has shape {tuple(shape)}, and the batch of {batch} is its {is_axis} axis: state layout={other!r}, or tap "
        "another module, with stages=[...]"
    )
