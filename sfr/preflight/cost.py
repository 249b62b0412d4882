"""Time and peak memory of training steps, measured side by side."""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class StepCost:
    """What one training step costs.

    Args:
        seconds: wall-clock time of each repeat.
        peak_bytes: most memory that tensors allocated during the step held at one time.
    """

    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)


def compare_steps(
    steps: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 5, warmup: int = 1
) -> dict[str, StepCost]:
    """Run several kinds of step in turn, so that a noisy machine disturbs all alike.

    The order changes from round to round, because what a step leaves in the caches affects the next one.

    Args:
        steps: what to run, by name.
        device: where the steps compute; an accelerator is synchronised before the clock is read.
        repeats: timed runs of each, >= 1.
        warmup: untimed runs of each before, >= 0.

    Returns:
        Times and peak memory by name.
    """
    for _ in range(warmup):
        for step in steps.values():
            step()
    peaks = {name: peak_memory(step, device) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(repeats):
        for name, step in order.sample(list(steps.items()), len(steps)):
            wait_for(device)
            start = time.perf_counter()
            step()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: StepCost(tuple(seconds[name]), peaks[name]) for name in steps}


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made during `step` held at one time.

    On CUDA this is the allocator's own figure; elsewhere each operation's results are counted while they live, which
    leaves out scratch space inside an operation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        step()
    return live.peak


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return results

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in given and key not in self._alive:
            self._alive.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.current -= size
