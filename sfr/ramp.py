"""Ramp: a number that moves with the training."""

from __future__ import annotations

from dataclasses import dataclass

from sfr.checks import check_number, plain_number


@dataclass(frozen=True)
class Ramp:
    """A number that moves linearly with the training step, and then stays.

    It is `start` for the first `after` steps, moves from there to `end` over `steps` steps, and stays at `end`. So it
    goes up (``Ramp(0, 0.2, 1000)``), down (``Ramp(0.2, 0, 10_000)``) or is cut off (``Ramp(0.2, 0, 1, after=5000)``).
    The weight of the feature term counts the step under way, alpha and `early_learning` the steps before it.

    Args:
        start: first value, >= 0.
        end: last value, >= 0.
        steps: training steps that the move takes, >= 1.
        after: training steps before it, >= 0.

    Raises:
        TypeError, ValueError: naming the argument, the value got and what is allowed.

    Example:
        >>> weight = Ramp(0, 0.2, steps=4)
        >>> [round(weight.at(step), 2) for step in range(6)]
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        check_number("Ramp: start", self.start, 0)
        check_number("Ramp: end", self.end, 0)
        check_number("Ramp: steps", self.steps, 1, whole=True)
        check_number("Ramp: after", self.after, 0, whole=True)
        for name in ("start", "end", "steps", "after"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))

    @classmethod
    def of(cls, value: float | Ramp) -> Ramp:
        """Return a number as a ramp that stays at it; a ramp as it is."""
        return value if isinstance(value, Ramp) else cls(value, value, 1)

    @property
    def largest(self) -> float:
        """The larger of both ends."""
        return max(self.start, self.end)

    def at(self, step: int) -> float:
        """Return the value after `step` training steps."""
        return self.start + (self.end - self.start) * min(1.0, max(0, step - self.after) / self.steps)
