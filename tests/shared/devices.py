"""A device for tests on machines without one: what would a step launch, and which way does it take?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sfr

WITHOUT_LAUNCH = ("detach", "promote_types", "scalar_tensor")


def pass_for_a_device(patch: pytest.MonkeyPatch) -> None:
    """Let maps in the CPU's memory, or without any, pass for those of a CUDA device."""
    patch.setattr(Tensor, "is_cuda", True)
    patch.setattr(Tensor, "is_cpu", False)


class OnItsDevice:
    """Stands in for a kernel and counts its launches; one outside the device of the tensors is an error.

    Args:
        patch: undoes what the test patches.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.given: list[Tensor] = []
        self.launches = 0
        patch.setattr(torch.cuda, "device_of", self._entered)

    @contextmanager
    def _entered(self, given: Tensor) -> Iterator[None]:
        self.given.append(given)
        yield
        self.given.pop()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, **__: Any) -> None:
            assert self.given, "Triton would launch on whatever device is the current one"
            self.launches += 1

        return launch


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch would launch on a device, for which tensors without memory stand in.

    These are all but views and what makes a tensor without filling it. Copies to the CPU are copies of random numbers,
    and what is done there does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name == "_to_copy" and given[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.count += 1
            return torch.rand(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        result = function(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        on_device = any(each.is_meta for each in (*given, *made))
        launched = not (function.is_view or name.startswith(("empty", "new_empty")) or name in WITHOUT_LAUNCH)
        self.count += on_device and launched
        return result


class StepWithoutMemory:
    """A training step of a network of four stages on tensors without memory; a call says how much it would launch.

    Args:
        dtype: of the network and the images.
        index: numbers of the eight images, if the criterion needs them.
        settings: of the criterion.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, index: Tensor | None = None, **settings: Any) -> None:
        stages = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 32), (32, 64))]
        net = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        self.model = sfr.SFRWrapper(net, stages=["0", "1", "2", "3"])
        self.model(torch.randn(2, 3, 64, 64))  # the first forward, which looks at the stages
        self.model.to("meta", dtype)
        self.images = torch.empty(8, 3, 64, 64, device="meta", dtype=dtype)
        self.labels = torch.empty(8, dtype=torch.long, device="meta")
        self.index = {} if index is None else {"index": index}
        self.criterion = sfr.SFRLoss(self.model, **settings)

    def __call__(self) -> int:
        with Operations() as operations:
            self.criterion(self.model(self.images), self.labels, **self.index).backward()
        return operations.count
