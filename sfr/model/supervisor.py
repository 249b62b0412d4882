"""Another network, such as a slow average of the weights, that gives the deep features in place of the model's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfr.model.outputs import feature_of

NO_ARGUMENTS = (
    "the supervisor sees what the model was called with, and that is not known of the last forward: the model runs as "
    "a part of what torch.compile has compiled (model.compile() compiles the model by itself), or was wrapped again "
    "after the criterion was made (make a new one)"
)
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Supervisor:
    """Runs another network on what the model was called with, without gradient, and records its stages.

    Args:
        network: has the model's stages by their names, or holds what has them as its ``module``. It stays in the mode
            that it is in.
        model: the model.

    Raises:
        TypeError, ValueError: if it is no other module.
    """

    def __init__(self, network: nn.Module, model: nn.Module) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"supervisor must be a module, such as AveragedModel(model) of torch.optim.swa_utils; got {network!r}"
            )
        if network is model:
            raise ValueError(
                "supervisor must be another network than the model, such as AveragedModel(model) of "
                "torch.optim.swa_utils; got the model itself"
            )
        self.network = network

    def features(self, names: Collection[str], arguments: Arguments | None, like: Tensor) -> dict[str, Tensor]:
        """Return the outputs of stages.

        Args:
            names: of the stages.
            arguments: of the model's last forward, positional and by name.
            like: a feature of that forward, by whose dtype it is seen to have run under autocast.

        Raises:
            RuntimeError: if the arguments are not known, or a stage did not run.
            ValueError: if there is no such stage.
        """
        if arguments is None:
            raise RuntimeError(NO_ARGUMENTS)
        network, stages = self._stages(names)
        found: dict[str, Tensor] = {}
        handles = [stage.register_forward_hook(_keep(name, found)) for name, stage in stages.items()]
        try:
            low = like.dtype in (torch.float16, torch.bfloat16)
            own = next((each.dtype for each in network.parameters() if each.is_floating_point()), like.dtype)
            with (
                torch.no_grad(),
                torch.autocast(like.device.type, like.dtype if low else None, low and own != like.dtype),
            ):
                network(*arguments[0], **arguments[1])
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name in names if name not in found]
        if silent:
            raise RuntimeError(f"stage(s) {silent} of the supervisor did not run in its forward")
        return found

    def _stages(self, names: Collection[str]) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Return the network, or the part of it, that has these stages, and the stages by name."""
        network = self.network
        while True:
            try:
                return network, {name: network.get_submodule(name) for name in names}
            except AttributeError:
                within = getattr(network, "module", None)
                if not isinstance(within, nn.Module):
                    missing = min(set(names) - {name for name, _ in self.network.named_modules()})
                    raise ValueError(
                        f"the supervisor, a {type(self.network).__name__}, has no stage {missing!r}: it must be built "
                        "as the model is"
                    ) from None
                network = within


def _keep(name: str, found: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        found[name] = feature_of(name, output)

    return hook
