"""What a watched forward shows of one module, and what kind of module it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils.weak import TensorWeakRef

from sfr.model.formats import View

# Stages of a model whose features are ordered by depth alone: more would make pairs of near copies.
STAGES_IN_DEPTH = 4


@dataclass(eq=False)
class Sighting:
    """The output of one module in the watched forward.

    Args:
        name, module: the submodule.
        shape: of its output.
        node: the autograd node that made it, if any; in-place operations later give the tensor another one.
        sole: whether the module returns no other feature; which of several is its output is for the user to say.
        output: a weak reference to the output, which lives on if the graph or the model needs it.
        kept: the output itself, as long as it may become the feature of a stage.
        view: how the output is read; None if it is no feature of the whole batch.
        cells: local features in it.
        problem: why it cannot be read, as the rest of a sentence that begins with the name of the stage.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    node: Any
    sole: bool
    output: TensorWeakRef | None = None
    kept: Tensor | None = None
    view: View | None = None
    cells: int = 0
    problem: str = ""

    @property
    def ndim(self) -> int:
        """Number of axes of the output."""
        return len(self.shape)

    @property
    def feature(self) -> Tensor | None:
        """The output; None if it was let go of."""
        return self.kept if self.kept is not None or self.output is None else self.output()

    @property
    def is_layer(self) -> bool:
        """Whether the module is a layer with weights."""
        return has_weights(self.module)

    @property
    def is_block(self) -> bool:
        """Whether the module has parts and is more than a container of them."""
        return is_block(self.module)

    @property
    def is_bare(self) -> bool:
        """Whether the module is a normalisation, a pooling or the like, which is a stage only where nothing else is."""
        kind = type(self.module).__name__.lower()
        return is_leaf(self.module) and any(word in kind for word in ("norm", "pool", "dropout", "permute"))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no parts."""
    return not any(True for _ in module.children())


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a layer: a convolution, a linear map, or a leaf with a matrix of its own."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return True
    return is_leaf(module) and any(not is_lazy(weight) and weight.ndim > 1 for weight in module.parameters())


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others."""
    return type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_block(module: nn.Module) -> bool:
    """Whether a module has parts and is more than a container of them."""
    return not is_leaf(module) and not is_container(module)


def ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold this one, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def outermost(names: list[str]) -> list[str]:
    """Leave out the modules inside others of the list."""
    among = set(names)
    return [name for name in names if not any(outer in among for outer in ancestors(name))]


def held(blocks: list[str], layers: list[str]) -> int:
    """Return how many of the layers lie inside the blocks."""
    among = set(blocks)
    return sum(any(outer in among for outer in ancestors(layer)) for layer in layers)


def even_places(count: int) -> list[int]:
    """Return the places of at most :data:`STAGES_IN_DEPTH` of `count` outputs, evenly spaced, with the last one."""
    stages = min(STAGES_IN_DEPTH, count)
    return [(k + 1) * count // stages - 1 for k in range(stages)]
