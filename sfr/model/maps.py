"""Maps: the outputs of a model's stages, channels first and without prefix tokens, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from sfr.model.formats import View, as_map
from sfr.model.graph import names_behind
from sfr.model.layouts import check_batches
from sfr.model.reading import assumed_view
from sfr.model.record import known_record
from sfr.model.rows import Returned, Rows, rows_of


class Maps:
    """Reads what the stages of one wrapped model return: as stated, or else as seen or inferred.

    Args:
        model: the wrapped model.
    """

    _by_position: bool | None = None  # of flattened predictions, as the last forward that told has shown

    def __init__(self, model: nn.Module) -> None:
        # Past nn.Module's own __setattr__ wherever this is kept: it does not own the model.
        self._model = model
        self._views: dict[str, View] = {}

    def of(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return stage outputs as maps (B, C, *spatial), or (B, C) of vectors.

        Raises:
            ValueError: naming the stage, if its output cannot be read so.
        """
        return {name: self._map_of(name, feature) for name, feature in features.items()}

    def of_step(self, features: Mapping[str, Tensor], logits: Tensor | None) -> tuple[dict[str, Tensor], list[str]]:
        """Return the maps of a training step, and the names of those whose gradient can take that of their nodes along.

        Through the logits every stage they were computed from gets a gradient. It is taken at the very output of the
        stage, which the map therefore has to be.

        Args:
            features: stage outputs.
            logits: those of the step; None if its loss is of something else, through which a stage may get none.

        Raises:
            ValueError: naming the stage, if its output cannot be read, or is not of the batch of the logits.
        """
        self._check(features, None if logits is None else logits.shape)
        maps = self.of(features)
        if logits is None:
            return maps, []
        # A tensor that has hooks from a step before, as replayed CUDA graphs give, takes none for its new graph.
        free = {name: each for name, each in features.items() if maps[name] is each and each._backward_hooks is None}
        return maps, names_behind(logits, free)

    def _map_of(self, name: str, feature: Tensor) -> Tensor:
        view = self.view_of(name, feature)
        try:
            return as_map(feature, view)
        except ValueError as error:
            raise ValueError(f"stage {name!r} {error}") from None

    def view_of(self, name: str, feature: Tensor) -> View:
        """Return how the output of a stage is read."""
        if name not in self._views:
            record = known_record(self._model)
            try:
                seen = (record.views or {}).get(name)
                self._views[name] = seen or assumed_view(self._model.get_submodule(name), feature, record.settings)
            except ValueError as error:
                raise ValueError(f"stage {name!r} {error}") from None
        return self._views[name]

    def order(self, names: Collection[str]) -> list[str]:
        """Return the names of all stages, the shallowest first, also of those that a forward skipped."""
        order = known_record(self._model).recorder.order
        return order if set(names) <= set(order) else list(names)

    def rows(self, logits: Sequence[int], images: int) -> Rows:
        """Return how the rows of logits of this shape belong to the images, see :func:`sfr.model.rows.rows_of`."""
        record = known_record(self._model)
        if record.recorder.output_shape is not None or record.returned is None:
            return rows_of(logits, images, record.recorder.output_shape)
        return rows_of(logits, images, record.returned.of(images), lengths=False)  # of a compiled forward

    def lie_by_position(self, images: int) -> bool:
        """Whether predictions that were flattened lie position by position, and not image by image (or text by text).

        So they do if the batch is the second axis of the model's output. If no forward has shown that, they do if it is
        not the first one of its input.
        """
        record = known_record(self._model)
        shape, seen = record.recorder.output_shape, record.returned
        found = None if shape is None else Returned(shape, images).has_batch_second()
        if found is None:
            found = self._by_position
        if found is None and seen is not None:
            found = seen.has_batch_second()
            if found is None and len(seen.shape) == 2 and seen.inputs is not None:
                sequences = any(view.layout == "sequence_first" for view in self._views.values())
                found = sequences and seen.inputs != seen.images
        self._by_position = found
        return bool(found)

    def _check(self, features: Mapping[str, Tensor], logits: Sequence[int] | None) -> None:
        """Raise a ``ValueError`` unless all stages have one batch size that fits the logits, if they are all there."""
        outputs = {name: (tuple(feature.shape), self.view_of(name, feature)) for name, feature in features.items()}
        images = next((shape[view.batch_axis] for shape, view in outputs.values()), None)
        partly = logits is not None and images is not None and self.rows(logits, images) == "some"
        check_batches(outputs, None if logits is None or partly else logits[0])
