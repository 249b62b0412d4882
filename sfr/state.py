"""TensorState: a module whose state is tensors of sizes that need not be known before the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# The key of nn.Module's get_extra_state, under which the state was kept before it was tensors.
EXTRA_STATE = "_extra_state"


class TensorState(nn.Module):
    """Base of a module that keeps its state in ``state_dict()`` as tensors, which are no buffers.

    DDP would send buffers to all ranks in every step, ``.half()`` would round them, and those of a fresh module could
    not be loaded from larger ones. A ``state_dict()`` holds copies: training on does not change it.
    """

    state_names: ClassVar[tuple[str, ...]]
    required_names: ClassVar[tuple[str, ...]] = ()  # integers; a state without them is an incomplete one
    optional: ClassVar[bool] = False  # whether it starts where it stands if a module that holds it was trained without

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the state under `state_names`; those of a size not known yet may be missing."""
        return {name: torch.tensor(getattr(self, name)) for name in self.required_names}

    def load_tensor_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state, copies of :meth:`tensor_state`; what is missing there is at its beginning.

        Raises:
            ValueError: if it is damaged.
        """
        for name in self.required_names:
            setattr(self, name, whole_number(name, state[name]))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: copy_of(value) for name, value in self.tensor_state().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.optional and prefix and not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        state_dict.update(self._state_of_before(state_dict.pop(prefix + EXTRA_STATE, None), prefix))
        keys = {prefix + name: name for name in self.state_names}
        own = {keys[key]: copy_of(state_dict.pop(key)) for key in keys if key in state_dict}
        missing = [prefix + name for name in self.required_names if name not in own]
        if missing:
            rest[2].extend(missing)  # the list of missing keys
        else:
            self.load_tensor_state(own)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _state_of_before(self, extra_state: Any, prefix: str) -> dict[str, Tensor]:
        """Return by key the state in what :meth:`get_extra_state` once returned: a dict, or the only tensor."""
        if isinstance(extra_state, Tensor):
            extra_state = {self.state_names[0]: extra_state}
        return {prefix + name: torch.as_tensor(value) for name, value in (extra_state or {}).items()}


def copy_of(value: Any) -> Tensor:
    """Return a contiguous copy that may be written into, also inside ``torch.inference_mode()``."""
    with torch.inference_mode(False):
        return torch.as_tensor(value).detach().clone(memory_format=torch.contiguous_format)


def whole_number(name: str, value: Tensor) -> int:
    """Return a count that a state holds, or raise a ``ValueError`` if it is none."""
    if value.numel() != 1 or not value.isfinite().all() or value.item() != int(value) or value.item() < 0:
        raise ValueError(f"the state is damaged: {name!r} must be one whole number, at least 0; got {value!r}")
    return int(value)
