"""Where torch.compile has to step aside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Let a function run eagerly, as a whole, also where the code around it is compiled.

    It is ``torch.compiler.disable``, put off to the first call because it loads the compiler. Under
    ``torch.compile(..., fullgraph=True)`` PyTorch raises its error for a graph break, with the lines that led here.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)  # runs eagerly by design: not with fullgraph=True
        return disabled(*args, **kwargs)  # runs eagerly by design: not with fullgraph=True

    return call  # type: ignore[return-value]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, in place or as the inner one of what ``torch.compile`` returns."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
