"""Files of weights, read with clear errors."""

import pickle

import torch
from torch import Tensor, nn


def load_backbone(model: nn.Module, file: str) -> None:
    """Load the weights in `file`, without those of a classifier that has another number of classes."""
    weights, own = read_weights(file, "--init"), model.state_dict()
    if weights.keys() != own.keys():
        strange = sorted(weights.keys() ^ own.keys())
        raise SystemExit(
            f"--init: {file} holds the weights of another model; {len(strange)} names differ: {strange[:4]}"
        )
    model.load_state_dict(
        {name: own[name] if value.shape != own[name].shape else value for name, value in weights.items()}
    )


def read_weights(file: str, option: str) -> dict[str, Tensor]:
    """Return the state dict in `file`; nothing but tensors is read."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        if isinstance(error, pickle.UnpicklingError):  # which advises to execute what is in it
            reason = "it is not what torch.save writes, or holds more than tensors"
        raise SystemExit(f"{option}: {file} is not a readable file of weights: {reason}") from error
    if not isinstance(weights, dict):
        raise SystemExit(f"{option}: {file} holds no weights, but a {type(weights).__name__}")
    return weights
