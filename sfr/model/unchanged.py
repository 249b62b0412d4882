"""Forwards and steps of a model that leave nothing behind in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into training or evaluation mode afterwards, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards, as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Train inside, and put buffers, gradients, mode and random state back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in gradients if parameter.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with (
            modes_kept(model),
            buffers_kept(model),
            torch.random.fork_rng(devices=list(devices)),
            torch.enable_grad(),
        ):
            model.train()
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
