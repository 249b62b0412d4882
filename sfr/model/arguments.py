"""An example input -> the arguments of one forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader


def forward_arguments(
    model: nn.Module, example_input: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example input into the positional and keyword arguments of a forward.

    Args:
        model: the model.
        example_input: the arguments one by one, or one tuple, list or dict of them.
        keywords: more of them, by name.

    Raises:
        TypeError: if the model's forward does not take them, or if one is a loader or an array of NumPy.
    """
    only = example_input[0] if len(example_input) == 1 else example_input
    by_name = isinstance(only, Mapping) and len(only) > 0
    kwargs = dict(only, **keywords) if by_name else dict(keywords)
    args = () if by_name else tuple(only) if isinstance(only, (tuple, list)) else (only,)
    for each in (*args, *kwargs.values()):
        if isinstance(each, (DataLoader, np.ndarray)):
            wanted = "a batch of it" if isinstance(each, DataLoader) else "torch.from_numpy(...)"
            raise TypeError(f"the model is called with tensors; got a {type(each).__name__}: give it {wanted}")
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([type(each).__name__ for each in args] + [f"{name}=..." for name in kwargs])
        raise TypeError(
            f"the model is called as forward{signature}, and the example input gives it ({given}): {error}. Give what "
            "your loop calls the model with, as in model.report(x): of a batch (images, labels), the images alone "
            "(labels go to the criterion: criterion.report(x, target=y)). If the forward takes a list or a dict as one "
            "argument, put it into a tuple: model.report((images,))"
        ) from None
    return args, kwargs
