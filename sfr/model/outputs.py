"""The readers of what a module returns: the logits in a model's output, the feature in a stage's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

# Where a model with several outputs keeps its logits: Hugging Face's ModelOutput, torchvision's segmentation models.
LOGITS = ("logits", "out")


def logits_in(output: Any) -> Tensor | None:
    """Return the logits in a model's output, or None if it holds no floating-point tensor.

    They are the tensor itself; of an output with named parts (a mapping, a ``ModelOutput``, a dataclass, a named tuple,
    an object's attributes) "logits" or "out"; else the first floating-point tensor with at least two axes, or the first
    of all.
    """
    parts = named_parts(output)
    for name in LOGITS:
        if _is_floating(parts.get(name)):
            logits: Tensor = parts[name]
            return logits
    leaves = [leaf for leaf in tree_leaves(_parts(output)) if _is_floating(leaf)]
    return next((leaf for leaf in leaves if leaf.ndim > 1), leaves[0] if leaves else None)


def last_in(output: Any) -> Tensor | None:
    """Return the last floating-point tensor in a model's output; None if its parts have names that tell the logits."""
    parts = named_parts(output)
    if any(name in parts for name in LOGITS):
        return None
    return next(filter(_is_floating, reversed(tensors_in(output))), None)


def the_logits(output: Any) -> Tensor:
    """Return the logits in a model's output, as :func:`logits_in`, or raise if other parts need a loss as well.

    Raises:
        TypeError: if it is not clear which part of the output they are, saying what to pass.
        ValueError: if there are auxiliary ones, which would get no loss.
    """
    if isinstance(output, Tensor):
        return output
    parts = named_parts(output)
    found = [name for name in LOGITS if _is_floating(parts.get(name))]
    if parts and len(found) != 1:
        raise TypeError(f"output must hold logits as one of 'logits' and 'out'; got the keys {list(parts)}")
    logits = logits_in(output)
    if logits is None or not (parts or _is_sequence_of_one(output)):
        raise TypeError(
            "output must be a tensor of logits, or a mapping that holds them as 'logits' or 'out'; got "
            f"{type(output).__name__}. Pass the logits in it, as in criterion(output[0], target), and add the losses "
            "of any auxiliary outputs."
        )
    auxiliary = [
        name for name, part in parts.items() if str(name).startswith("aux") and _is_floating(part) and part.ndim
    ]
    if auxiliary:
        access = "output[{!r}]" if isinstance(output, Mapping) else "output.{}"
        others = ""
        for name in auxiliary:
            part = access.format(name)
            others += f" + 0.5 * F.cross_entropy({part}, target)" if parts[name].ndim > 1 else f" + 0.5 * {part}.mean()"
        raise ValueError(
            "output holds auxiliary logits or losses, which would be left out; use "
            f"criterion({access.format(found[0])}, target){others}"
        )
    return logits


def part_with_graph(output: Any) -> Tensor:
    """Return the logits in a model's output or, if they have no autograd graph, the first tensor that has one.

    Raises:
        TypeError: if the output holds no floating-point tensor.
    """
    found = logits_in(output)
    if found is None:
        raise TypeError(
            f"output must hold a floating-point tensor that the model computed; got {type(output).__name__}"
        )
    return next((leaf for leaf in (found, *tensors_in(output)) if leaf.grad_fn is not None), found)


def tensors_in(output: Any) -> list[Tensor]:
    """Return all tensors in a model's output."""
    return [leaf for leaf in tree_leaves(_parts(output)) if isinstance(leaf, Tensor)]


def features_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a stage's output; the first is its feature. A packed sequence has none."""
    return [] if _is_packed(output) else [part for part in _parts(output) if _is_floating(part)]


def feature_of(name: str, output: Any) -> Tensor:
    """Return the feature in a stage's output: the tensor itself, or the first floating one of a container.

    Raises:
        TypeError: naming the stage, if its output holds no floating-point tensor, or one that is spread over ranks.
    """
    features = features_in(output)
    if not features:
        if _is_packed(output):
            raise TypeError(
                f"stage {name!r} returns a packed sequence, in which the texts of a batch lie mixed; let a module of "
                "yours hold the layer and unpack what it returns (torch.nn.utils.rnn.pad_packed_sequence), and name it"
            )
        raise TypeError(
            f"stage {name!r} returns no floating-point tensor but {_kind_of(output)}; tap a submodule that does, with "
            "stages=[...]"
        )
    return on_this_rank(name, features[0])


def on_this_rank(name: str, feature: Tensor) -> Tensor:
    """Return the feature of a stage, or raise a ``TypeError`` if it is spread over several ranks."""
    if type(feature) is not Tensor and hasattr(feature, "placements"):
        raise TypeError(
            f"stage {name!r} returns a DTensor, which lies on several ranks; wrap the model after parallelize_module, "
            "or name stages that return plain tensors"
        )
    return feature


def _is_packed(output: Any) -> bool:
    parts = [output, *_parts(output)]
    return PackedSequence in [type(part) for part in parts]  # which also old versions of torch.compile can trace


def _kind_of(output: Any) -> str:
    if not isinstance(output, Tensor):
        return type(output).__name__
    return "a nested one" if output.is_nested else f"one of {output.dtype}"


def named_parts(output: Any) -> dict[Any, Any]:
    """Return the parts of an output by name; none of a tensor, a tuple or a list."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return dict(output._asdict())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {} if isinstance(output, (Tensor, tuple, list, type)) else getattr(output, "__dict__", {})


def _parts(output: Any) -> list[Any]:
    """Return the parts of an output; torch.compile traces this for tensors, tuples and mappings."""
    if isinstance(output, (Tensor, tuple, list)):
        return [output] if isinstance(output, Tensor) else list(output)
    if isinstance(output, Mapping):
        return list(output.values())
    return list(named_parts(output).values())


def _is_floating(part: Any) -> bool:
    """Whether it is a floating-point tensor that has a shape, as nested ones have not."""
    return isinstance(part, Tensor) and part.is_floating_point() and not part.is_nested


def _is_sequence_of_one(output: Any) -> bool:
    return isinstance(output, (tuple, list)) and len(output) == 1
