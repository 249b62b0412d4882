"""What one training of the accuracy benchmark is: a method, a seed, a schedule, and the part it is judged on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.paths import RESULTS

CELLS = RESULTS / "accuracy"  # the folder of all results


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: a short linear warm-up, then one cosine to zero.

    "sgd" has Nesterov momentum 0.9; "adamw" has PyTorch's betas, and gradients clipped to norm 1.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    image_size: int = 32
    per_class: int | None = None  # labelled images of each class, drawn anew for each seed; None takes all
    label_noise: float = 0.0  # share of the training labels that are replaced by another class
    augmentation: str = "crop-flip"
    optimizer: str = "sgd"
    precision: str = "bf16"  # "fp32" is several times faster on a CPU without bfloat16 instructions


@dataclass(frozen=True)
class Cell:
    """What is trained and on which part it is judged: "held-out", for choices, or "test", once."""

    arm: str
    seed: int
    part: str
    schedule: str
    model: str = "resnet20"
    dataset: str = "cifar100"

    @property
    def file(self) -> Path:
        """Where the result lies, below the folder of all results."""
        return Path(f"{self.schedule}-{self.part}", f"{self.dataset}-{self.model}-{self.arm}-seed{self.seed}.json")
