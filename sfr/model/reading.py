"""How the output of a module is read: which axis is the batch, which the channels, and which tokens are dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sfr.config import Layout
from sfr.model.formats import Grid, View, cells, spatial_shape, token_grid
from sfr.model.kinds import holds_sequence_first, is_batch_first
from sfr.model.layouts import infer_layout, swapped_axes
from sfr.model.rows import Returned
from sfr.model.settings import StageSettings
from sfr.model.trace import Sighting, Trace

# A sequence that is longer than the map by more than this does not come from the map.
MOST_PREFIX_TOKENS = 16

UNCLEAR = (
    "has shape {shape}, and which of its first two axes is the batch cannot be told: they are equally long, and the "
    "model holds layers with batch_first=False. State layout='sequence_first' if the batch is the second axis, "
    "layout='tokens' if it is the first, or begin with a batch of another size"
)


class Reader:
    """Tells how one output after another is read, from the layers and maps that went before.

    Args:
        settings: its ``layout`` and ``prefix_tokens`` overrule what is seen.
        batches: what may be the length of the batch, the likeliest first; of the logits, and of the input. If nothing
            shows it, it is the first axis of what the first layer returns.
        seen: all outputs of the forward, as far as known.
        named: names of the stages, if the user gave them.
    """

    def __init__(
        self,
        settings: StageSettings,
        batches: Iterable[int],
        seen: Iterable[Sighting] = (),
        named: Iterable[str] = (),
    ) -> None:
        self._settings = settings
        self._batches = list(batches)
        self._named = set(named)
        self._layer: nn.Module | None = None
        self._maps: list[Grid] = []
        self._prefix = 0
        # The first two axes, sequence and batch, of what layers with batch_first=False return.
        self._sequences = {each.shape[:2] for each in seen if each.ndim == 3 and is_batch_first(each.module) is False}

    def read(self, sighting: Sighting) -> Sighting:
        """Return a sighting with view and cells, and what is wrong with it; none if it is not of the whole batch."""
        if not self._batches and sighting.is_layer and sighting.ndim > 1:
            self._batches = [sighting.shape[0]]
        if isinstance(sighting.module, _ConvNd):
            # The first axis of what it returns is a batch, or some multiple of one.
            self._batches.sort(key=lambda batch: batch != sighting.shape[0])
        try:
            axis = self._batch_axis(sighting)
            view, cells = (None, 0) if axis is None else self._view(sighting, axis)
        except ValueError as error:
            return dataclasses.replace(sighting, view=None, cells=0, problem=str(error))
        problem = UNCLEAR.format(shape=sighting.shape) if self._is_unclear(sighting) else ""
        return dataclasses.replace(sighting, view=view, cells=cells, problem=problem)

    def _view(self, sighting: Sighting, batch_axis: int) -> tuple[View, int]:
        if sighting.is_layer:
            self._layer = sighting.module
        layout = self._settings.layout
        if layout == "auto":
            layout = self._inferred(sighting, batch_axis)
        try:
            shape = spatial_shape(sighting, layout)
        except ValueError:
            if sighting.ndim > 3:  # no stage as the layout is stated, but it shows the map that the tokens come from
                self._note_map(sighting, spatial_shape(sighting, self._inferred(sighting, 0)))
            raise
        tokens = layout in ("tokens", "sequence_first")
        view = self._tokens(layout, *shape) if tokens else View(layout)
        self._note_map(sighting, (cells(shape) - view.prefix,) if tokens else shape)
        return view, cells(shape) - view.prefix

    def _inferred(self, sighting: Sighting, batch_axis: int) -> Layout:
        if batch_axis:
            return "sequence_first"
        return infer_layout(sighting.module, sighting, self._layer, self._maps[-1] if self._maps else None)

    def _note_map(self, sighting: Sighting, grid: Grid) -> None:
        if sighting.is_layer and cells(grid) > 1:
            self._maps.append(grid)

    def _batch_axis(self, sighting: Sighting) -> int | None:
        """Return which axis is the batch; None if none is.

        Raises:
            ValueError: for a named stage whose layout, as stated or as a rule, has it on the wrong one.
        """
        shape, stated = sighting.shape, self._settings.layout
        if stated == "sequence_first":
            axis = 1 if sighting.ndim != 3 or shape[1] in self._batches else None
        elif stated != "auto":
            axis = 0 if shape and shape[0] in self._batches else None
        else:
            axes = (self._axis_of(batch, sighting) for batch in self._batches)
            axis = next((axis for axis in axes if axis is not None), None)
        if axis is None and sighting.name in self._named:
            if sighting.ndim == 3 and self._batches and shape[1 - (stated == "sequence_first")] == self._batches[0]:
                raise ValueError(swapped_axes(shape, self._batches[0], stated))
            axis = int(stated == "sequence_first")
        return axis

    def _axis_of(self, batch: int, sighting: Sighting) -> int | None:
        """Return which axis is the batch, if it is as long as this; of three axes it may be the second."""
        shape = sighting.shape
        if batch not in shape[:2]:
            return None
        if sighting.ndim != 3:
            return 0 if shape[0] == batch else None
        batch_first = is_batch_first(sighting.module)
        if batch_first is not None:
            return 1 - batch_first if not batch_first or shape[0] == batch else None
        if shape[:2] in self._sequences:
            return int(shape[0] != shape[1])
        if shape[0] == batch:
            return 0
        # Windows of a map are a multiple of the batch, too, and may be as long as it.
        return 1 if batch == 1 or shape[0] % batch else None

    def _is_unclear(self, sighting: Sighting) -> bool:
        """Whether the batch may be the first or the second axis of an output, by the layers of the model."""
        if not self._is_tied(sighting):
            return False
        return sighting.shape[:2] in self._sequences or holds_sequence_first(sighting.module)

    def _is_tied(self, sighting: Sighting) -> bool:
        """Whether the first two of three axes are both as long as the batch, and nobody states which one it is."""
        shape = sighting.shape
        if self._settings.layout != "auto" or len(shape) != 3 or is_batch_first(sighting.module) is not None:
            return False
        return shape[0] == shape[1] and shape[0] in self._batches

    def _tokens(self, layout: Layout, count: int) -> View:
        """Return the view of `count` tokens.

        Those beyond the cells of a map, or beyond the length of a sequence, written before are prefix tokens. Where
        none fits (tokens were merged) there are as many as before. The rest lies like a map of the same proportions.
        """
        surplus = [extra for extra in (count - cells(grid) for grid in self._maps) if 0 <= extra <= MOST_PREFIX_TOKENS]
        if self._settings.prefix_tokens != "auto":
            self._prefix = self._settings.prefix_tokens
        elif surplus:
            self._prefix = min(surplus)
        local = count - self._prefix
        nearest = sorted(self._maps, key=lambda grid: abs(cells(grid) - local))
        fitting = (grid for grid in nearest if local > 0 and len(token_grid(local, grid)) > 1)
        return View(layout, self._prefix, next(fitting, ()))


def views_of(trace: Trace, names: Iterable[str]) -> dict[str, View]:
    """Return how the output of each of these modules is read, as far as they were seen.

    Raises:
        ValueError: naming the stage, if it cannot be told which of its axes is the batch.
    """
    wanted = set(names)
    seen = {sighting.name: sighting for sighting in trace.sightings if sighting.name in wanted}
    for name, sighting in seen.items():
        if sighting.problem:
            raise ValueError(f"stage {name!r} {sighting.problem}")
    return {name: sighting.view for name, sighting in seen.items() if sighting.view}


def seen_logits(trace: Trace, views: Mapping[str, View]) -> Returned | None:
    """Return what a forward has shown of the logits beside the stages; None if there were none of either."""
    sizes = [each.shape[views[each.name].batch_axis] for each in trace.sightings if each.name in views]
    if not sizes or not sizes[0] or not trace.logits_shape:
        return None
    return Returned(trace.logits_shape, sizes[0], trace.batch)


def assumed_view(stage: nn.Module, feature: Tensor, settings: StageSettings) -> View:
    """Return how to read the output of a stage whose forward was not watched.

    Raises:
        ValueError: if the layout or the number of prefix tokens cannot be told.
    """
    layout = settings.layout
    if layout == "auto":
        layout = infer_layout(stage, feature)
        if layout == "tokens" and is_batch_first(stage) is False:
            layout = "sequence_first"
        elif layout == "tokens" and holds_sequence_first(stage):
            raise ValueError(
                "holds layers with batch_first=False, and no watched forward has shown which of its axes is the batch: "
                "state layout='sequence_first' if it is the second, or 'tokens' if it is the first"
            )
    if layout not in ("tokens", "sequence_first"):
        return View(layout)
    if settings.prefix_tokens == "auto":
        raise ValueError(
            "gives tokens, and no watched forward has shown how many of them are class or register tokens: pass "
            "example_input= to the wrapper if its first forward is compiled, or state prefix_tokens= (0 if none)"
        )
    return View(layout, settings.prefix_tokens)
