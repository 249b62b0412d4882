"""Models whose layers are spread over several ranks (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sfr.model.kinds import is_leaf
from sfr.model.stages import HOW_TO_NAME
from sfr.model.trace import Sighting

MAY_BE_PARTS = (
    "the weights of {!r} are spread over several ranks (tensor parallelism), so that a layer may return a part "
    "of the channels, another on each rank. The stages found are {}; name others, whose outputs are whole. {}"
)


def has_sharded_weights(module: nn.Module) -> bool:
    """Whether weights of a module itself are spread over several ranks; while it runs, those of FSDP2 are not."""
    weights = module.parameters(recurse=False)
    return any(part.is_shard() for weight in weights for part in getattr(weight, "placements", ()))


def check_whole(stages: Sequence[Sighting], sharded: Sequence[str]) -> None:
    """Raise a ``ValueError`` if what stages return may be a part of the channels: layers do, and blocks do not.

    Args:
        stages: as they were found.
        sharded: names of the modules with sharded weights.
    """
    if sharded and any(is_leaf(stage.module) for stage in stages):
        names = [stage.name for stage in stages]
        raise ValueError(MAY_BE_PARTS.format(sharded[0], names, HOW_TO_NAME))
