"""The schedule of the learning rate that the examples and the accuracy benchmark train with."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_then_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Linear over the first twentieth of the run, then half a cosine down to zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)
