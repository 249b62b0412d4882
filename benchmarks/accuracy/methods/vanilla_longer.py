"""Vanilla training with as much time as sfr."""

from benchmarks.accuracy.methods.arm import Arm, Task


class VanillaLonger(Arm):
    """Plain cross-entropy for `factor` times as many epochs."""

    def __init__(self, task: Task, factor: float = 1.05) -> None:
        super().__init__(task)
        self.epochs_factor = factor
