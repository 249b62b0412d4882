"""All ranks use the same stages: those that the first rank to find any has found."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from sfr.model.settings import StageSettings

_asked: Counter[str] = Counter()


def first_found(found: Sequence[str], model: nn.Module, settings: StageSettings) -> tuple[str, ...]:
    """Return the stages that the first rank has found in this model: every rank gets the same ones.

    It is no collective operation: the first rank leaves its answer in the store of the process group, where the others
    find it. No rank waits for another, and one that is alone in watching a forward takes its own answer. Several models
    of the same structure are told apart by their order.

    Args:
        found: names of the stages, as this rank would choose them.
        model: the model.
        settings: what the user stated of the stages.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tuple(found)
    parts = [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    structure = hashlib.sha256("\n".join([repr(settings), *parts]).encode()).hexdigest()
    _asked[structure] += 1
    key = f"sfr/stages/{structure}/{_asked[structure]}"
    answer = distributed_c10d._get_default_store().compare_set(key, "", json.dumps(list(found)))
    return tuple(json.loads(answer))
