"""What the server of processes.py loads once, for all the ranks that are forked from it."""

import accelerate  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo  # by the first forward
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torchvision  # noqa: F401

import sfr

sfr.transport.solve(torch.rand(1, 2, 2))  # the compiled solver
