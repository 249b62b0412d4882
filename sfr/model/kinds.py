"""Kinds of modules, and where they lie in one another, by their names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy


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


def is_bare(module: nn.Module) -> bool:
    """Whether a module is a normalisation, a pooling or the like, which is a stage only where nothing else is."""
    kind = type(module).__name__.lower()
    return is_leaf(module) and any(word in kind for word in ("norm", "pool", "dropout", "permute"))


def is_batch_first(module: nn.Module) -> bool | None:
    """Whether the batch is the first axis of what a module of PyTorch's own returns; None if it may be either."""
    if is_container(module):
        parts = list(module.children())
        return is_batch_first(parts[-1]) if parts else None
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return is_batch_first(module.layers[0])
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return is_batch_first(module.self_attn)
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.Transformer)):
        return bool(module.batch_first)
    return None


def holds_sequence_first(module: nn.Module) -> bool:
    """Whether a module holds an attention or a recurrent layer with ``batch_first=False``."""
    return any(getattr(part, "batch_first", None) is False for part in module.modules())


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
