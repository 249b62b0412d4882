"""What the server of processes.py loads once, for all the ranks that are forked from it.

Nothing that reads the environment of the Hub when it is imported, such as Accelerate: a rank may have one of its own.
"""

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo  # by the first forward
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torchvision  # noqa: F401

import sfr

sfr.transport.solve(torch.rand(1, 2, 2))  # the compiled solver
