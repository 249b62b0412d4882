"""What was seen in one watched forward, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfr.config import Layout
from sfr.model import kinds
from sfr.model.formats import View


@dataclass(frozen=True, eq=False)
class Sighting:
    """The output of one module in the watched forward.

    Args:
        name, module: the submodule.
        shape: of its output.
        node: the autograd node that made it, if any; in-place operations later give the tensor another one.
        sole: whether the module returns no other feature; which of several is its output is for the user to say.
        view: how the output is read; None if it is no feature of the whole batch.
        cells: local features in it.
        problem: why it cannot be read, as the rest of a sentence that begins with the name of the stage.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    node: Any = None
    sole: bool = True
    view: View | None = None
    cells: int = 0
    problem: str = ""

    @property
    def ndim(self) -> int:
        """Number of axes of the output."""
        return len(self.shape)

    @property
    def is_layer(self) -> bool:
        """Whether the module is a layer with weights."""
        return kinds.has_weights(self.module)

    @property
    def is_block(self) -> bool:
        """Whether the module has parts and is more than a container of them."""
        return kinds.is_block(self.module)

    @property
    def is_bare(self) -> bool:
        """Whether the module is a normalisation, a pooling or the like, which is a stage only where nothing else is."""
        return kinds.is_bare(self.module)


@dataclass(frozen=True)
class Trace:
    """What one forward of a model has shown.

    Args:
        sightings: the outputs of the submodules, in forward order.
        calls: how often each submodule was called, by name.
        counts: how many modules of each type the model holds.
        logits_shape, logits_node: shape of the logits, and the autograd node that made them; None if there are none.
        last_shape, last_node: the same of the last tensor, if the model returns several and does not say by their names
            which of them are the logits.
        batch: what the batch seems to be by the input; None if that shows none.
        layout: the layout of the stages, as the user stated it.
        without_gradient: names of the submodules that ran under ``torch.no_grad()`` where the model did not.
        sharded: names of the submodules whose weights were spread over several ranks while they ran.
        outputs: the outputs that are still there, by the name of their module.
        model: name of the model's class, for messages.
    """

    sightings: tuple[Sighting, ...]
    calls: Mapping[str, int]
    counts: Mapping[type, int]
    logits_shape: tuple[int, ...] | None = None
    logits_node: Any = None
    last_shape: tuple[int, ...] | None = None
    last_node: Any = None
    batch: int | None = None
    layout: Layout = "auto"
    without_gradient: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    model: str = "the model"
