"""What is tried of a model: one training step with two lines, and a hundred steps with and without them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import sfr
from benchmarks.models.memorise import memorise
from benchmarks.models.zoo import build, logits_of, smallest_input

Record = dict[str, Any]
TRAINED_IMAGES = 8


def attempt(name: str, group: str) -> Record:
    """Wrap a model, run one training step and a few timed ones, and return what was seen."""
    torch.manual_seed(0)
    plain = build(name, group)
    inputs = smallest_input(plain, group)
    target = torch.randint(10, (len(inputs),))
    model = sfr.SFRWrapper(plain.train())
    criterion = sfr.SFRLoss(model)
    logits = logits_of(model(inputs))
    features = model.sfr.take_features(logits)
    views = {stage: criterion.maps.view_of(stage, feature) for stage, feature in features.items()}
    # Each alone, to see where it sends a gradient.
    terms = {pair: term.value for pair, term in criterion.terms_of(features).items()}
    result = {
        "input": list(inputs.shape[1:]),
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "stages": {
            stage: {"shape": list(feature.shape), "layout": views[stage].layout, "dropped": views[stage].prefix}
            for stage, feature in features.items()
        },
        "pairs": len(terms),
        "feature": float(torch.stack(list(terms.values())).mean()),
        "gradients": gradients(terms, model),
    }
    del features, terms, logits
    return result | {"time_ratio": time_ratio(model, criterion, inputs, target)}


def gradients(terms: dict[str, Tensor], model: sfr.SFRWrapper) -> dict[str, float]:
    """Return by shallow stage the norm of the gradient that its pairs give to its parameters.

    Of a stage without parameters (an activation), to those of the whole model.
    """
    norms = {}
    for stage in dict.fromkeys(pair.split(" <- ")[0] for pair in terms):
        term = torch.stack([value for pair, value in terms.items() if pair.startswith(f"{stage} <- ")]).sum()
        parameters = list(model.sfr.stage(stage).parameters()) or list(model.parameters())
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[stage] = sum(float(gradient.norm()) ** 2 for gradient in found if gradient is not None) ** 0.5
    return norms


def time_ratio(model: sfr.SFRWrapper, criterion: sfr.SFRLoss, inputs: Tensor, target: Tensor) -> float:
    """Return the time of one step with SFR over that of one plain step."""

    def plain_step() -> None:
        with model.disable():
            nn.functional.cross_entropy(logits_of(model(inputs)), target).backward()

    def sfr_step() -> None:
        criterion(logits_of(model(inputs)), target).backward()

    seconds = []
    for step in (plain_step, sfr_step):
        model.zero_grad()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[1] / seconds[0]


def trained(name: str, group: str) -> Record:
    """Train a model and return what was seen."""
    torch.manual_seed(0)
    plain = build(name, group)
    inputs = smallest_input(plain, group)
    images = torch.randn(TRAINED_IMAGES, *inputs.shape[1:])
    return memorise(plain, images, torch.randint(10, (TRAINED_IMAGES,)), logits_of)
