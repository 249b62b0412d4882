"""PooledFeatures: the features of a network before its last activation, one vector per image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfr.feature.nodes import to_nodes
from sfr.model.formats import View, as_map
from sfr.model.layouts import infer_layout
from sfr.model.outputs import feature_of

ACTIVATIONS = {
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.prelu),
    *(F.rrelu, F.threshold, F.softplus, F.softsign, F.logsigmoid, F.hardsigmoid, F.tanhshrink, F.hardshrink),
    *(F.softshrink, F.sigmoid, F.tanh, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_),
    *(Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_),
    *(torch.relu, torch.relu_, torch.prelu, Tensor.relu, Tensor.relu_),
}


class PooledFeatures(nn.Module):
    """Return pooled features of a model, shape (B, D), instead of its logits.

    The place is found in the first forward, by an extra pass in evaluation mode: it is the input of the last
    activation whose output, averaged over space, is what the classifier (the last linear layer) takes in. That is
    "before the last block's final ReLU" in ResNets and MobileNetV2 alike, no matter whether the activation is a
    module, shared within the block, in place or a function. If there is no such activation, as in a vision transformer
    or if a normalisation follows it, the features are the input of the classifier: a ViT's pooled token.

    The model is neither edited nor hooked between forwards, and stays usable as ``.model``. Its head runs but gets no
    gradient: under DDP set ``find_unused_parameters=True``.

    Args:
        model: any classifier of images.
        at: full name of a submodule whose output is to be taken instead, averaged over space or tokens.

    Raises:
        ValueError: if the model has no submodule `at`; in the first forward, if there is no classifier, or no image
            gives finite features.

    Reference:
        He et al., CVPR 2022, arXiv 2203.05180; their code takes both networks' features before the last ReLU.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> images = torch.randn(2, 3, 6, 6)
        >>> torch.allclose(PooledFeatures(model)(images), model[0](images).mean(dim=(2, 3)))
        True
    """

    def __init__(self, model: nn.Module, at: str | None = None) -> None:
        super().__init__()
        if at is not None and at not in dict(model.named_modules()):
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"{type(model).__name__} has no submodule at={at!r}; its children are {children}, and "
                "model.named_modules() lists all names"
            )
        self.model = model
        self.at = at
        self._activation: int | None = None
        self._activations: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model and return the features, shape (B, D), in float32 (float64 stays).

        Raises:
            RuntimeError: if the place is not passed exactly as in the first forward.
        """
        if self.at is not None:
            return self._output_of(self.at, args, kwargs)
        if self._activations is None:
            self._find_place(args, kwargs)
        with _Watch(self._activation) as watch:
            self.model(*args, **kwargs)
        if watch.activations != self._activations:
            raise RuntimeError(
                f"{type(self.model).__name__} called {watch.activations} activations, and {self._activations} in the "
                "first forward: its graph differs between calls or modes. Name the place with at=..."
            )
        feature = watch.classifier_input if self._activation is None else watch.before
        assert feature is not None  # the counts agree
        return feature

    @torch.no_grad()
    def _find_place(self, args: Any, kwargs: Any) -> None:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with _Watch(keep_outputs=True) as watch:
                self.model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True
        if watch.classifier_input is None:
            raise ValueError(
                f"{type(self.model).__name__} has no classifier, a linear layer on (B, D), before which its features "
                "could be found. Name a submodule with at=..."
            )
        if not watch.classifier_input.isfinite().all(dim=1).any():
            raise ValueError(
                f"the features of {type(self.model).__name__} cannot be found from this batch: no image has finite "
                "features before the classifier. Check the images, or name a submodule with at=..."
            )
        matches = [k for k, output in enumerate(watch.outputs) if _same(output, watch.classifier_input)]
        self._activation = matches[-1] if matches else None
        self._activations = watch.activations

    def _output_of(self, name: str, args: Any, kwargs: Any) -> Tensor:
        features: list[Tensor] = []

        def tap(module: nn.Module, _: Any, output: Any) -> None:
            feature = feature_of(name, output)
            feature_map = as_map(feature, View(infer_layout(module, feature)))
            nodes = to_nodes(feature_map, (1,) * (feature_map.ndim - 2))
            features.append(nodes.squeeze(1).clone())  # the next layer may write over the output

        handle = self.model.get_submodule(name).register_forward_hook(tap)
        try:
            self.model(*args, **kwargs)
        finally:
            handle.remove()
        if len(features) != 1:
            raise RuntimeError(f"at={name!r} fired {len(features)} times in one forward; name a module called once")
        return features[0]


class _Watch(TorchFunctionMode):
    """Sees the activations and linear layers of one forward, called as modules or as functions."""

    def __init__(self, activation: int | None = None, keep_outputs: bool = False) -> None:
        super().__init__()
        self.activation, self.keep_outputs = activation, keep_outputs
        self.activations = 0
        self.before: Tensor | None = None
        self.classifier_input: Tensor | None = None
        self.outputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[0].ndim == 2:
            self.classifier_input = _pool(args[0])
        if func not in ACTIVATIONS:
            return func(*args, **kwargs)
        if self.activations == self.activation:
            self.before = _pool(args[0])
        self.activations += 1
        output = func(*args, **kwargs)
        if self.keep_outputs:
            self.outputs.append(_pool(output))
        return output


def _pool(feature: Tensor) -> Tensor:
    """Average a map (B, C, ...) over space; of a vector, a copy, because the next layer may write over it."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    return feature.to(dtype, copy=True) if feature.ndim < 3 else feature.flatten(2).mean(dim=2, dtype=dtype)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two features are equal but for the rounding of a half-precision pooling, in the images without NaN."""
    if left.shape != right.shape:
        return False
    finite = right.isfinite().all(dim=1)
    left, right = left[finite], right[finite]
    return bool((left - right).norm() <= 0.01 * right.norm())
