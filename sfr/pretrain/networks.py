"""A classifier as an encoder, and the heads that self-supervised learning puts on it."""

from __future__ import annotations

import copy
import difflib

from torch import Tensor, nn

from sfr.checks import check_choice
from sfr.model.outputs import feature_of
from sfr.pretrain.dogo import Objective


class TwoViewNetwork(nn.Module):
    """An encoder with the heads of its objective; it returns what :class:`sfr.pretrain.DoGoLoss` takes.

    Args:
        model: a classifier, which is not changed; see :func:`encoder_of`.
        objective: "simclr" (encoder, projector) or "simsiam" (encoder, projector, predictor).
        head: name of the classifier's head; None finds it.

    Attributes:
        encoder: the model without its head, sharing its weights: once it is pre-trained the model is.
        dim: width of the encoder's features.
        projector, predictor: the heads, by default :func:`simclr_projector` or :func:`simsiam_projector` and
            :func:`simsiam_predictor`; the predictor of "simclr" is None. Replace them for other sizes.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> network = TwoViewNetwork(resnet18())
        >>> projection_a, projection_b = network(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))
        >>> projection_a.shape
        torch.Size([2, 128])
    """

    def __init__(self, model: nn.Module, objective: Objective = "simclr", head: str | None = None) -> None:
        super().__init__()
        check_choice("objective", objective, Objective)
        self.encoder, self.dim = encoder_of(model, head)
        self.predictor: nn.Module | None = None
        if objective == "simclr":
            self.projector = simclr_projector(self.dim)
        else:
            self.projector = simsiam_projector(self.dim)
            self.predictor = simsiam_predictor()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Return the projections of two views of the same images, and after them the predictions if there are any.

        Each view goes through the network on its own, so that BatchNorm sees one view at a time (authors' code).
        """
        projections = tuple(self.projector(self.features(view)) for view in (a, b))
        if self.predictor is None:
            return projections
        return projections + tuple(self.predictor(projection) for projection in projections)

    def features(self, images: Tensor) -> Tensor:
        """Return the encoder's features of images, shape (B, dim).

        Raises:
            TypeError, ValueError: if the model without its head gives something else.
        """
        features = feature_of("encoder", self.encoder(images))
        if features.shape != (len(images), self.dim):
            raise ValueError(
                f"without its head the model gives shape {tuple(features.shape)}, not {(len(images), self.dim)}: "
                "name the layer that makes the logits, with head='...'"
            )
        return features


def encoder_of(model: nn.Module, head: str | None = None) -> tuple[nn.Module, int]:
    """Return a classifier without its head, and the width of the features that it then gives.

    The encoder shares the model's modules and weights, with an identity instead of the head. The model itself does not
    change.

    Args:
        model: a classifier, such as those of torchvision and timm.
        head: name of the submodule that makes the logits; None takes the last ``nn.Linear``.

    Raises:
        ValueError: if the model has no submodule of this name, or its width is unknown.

    Example:
        >>> import torch
        >>> from torchvision.models import mobilenet_v2
        >>> model = mobilenet_v2()
        >>> encoder, dim = encoder_of(model)
        >>> encoder.eval()(torch.randn(2, 3, 32, 32)).shape, dim
        (torch.Size([2, 1280]), 1280)
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if head is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(model).__name__} has no nn.Linear inside: name its head, with head='...'")
        head = linear[-1]
    if head not in modules:
        near = difflib.get_close_matches(head, modules, n=5, cutoff=0.5) or list(modules)[-5:]
        raise ValueError(f"the model has no head {head!r}; near names: {', '.join(near)}")
    return _with_identity(model, head.split(".")), _width_before(head, modules[head])


def _with_identity(module: nn.Module, path: list[str]) -> nn.Module:
    """Return a copy of the module with an identity at `path`; only the modules along the path are copied, shallowly."""
    name, *rest = path
    child = module._modules[name]
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: _with_identity(child, rest) if rest and child else nn.Identity()}
    return clone


def _width_before(name: str, head: nn.Module) -> int:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"head {name!r} holds neither nn.Linear nor nn.Conv2d, so its width is unknown; name another one")


def simclr_projector(dim: int, hidden: int = 512, out: int = 128) -> nn.Sequential:
    """Return SimCLR's projector as DoGo has it: dim -> hidden, BatchNorm, ReLU -> out (authors' code)."""
    return nn.Sequential(*_layer(dim, hidden), nn.Linear(hidden, out))


def simsiam_projector(dim: int, hidden: int = 2048, out: int = 2048) -> nn.Sequential:
    """Return SimSiam's projector: three linear layers with BatchNorm, ReLU between them (Chen & He, CVPR 2021)."""
    return nn.Sequential(
        *_layer(dim, hidden), *_layer(hidden, hidden), nn.Linear(hidden, out, bias=False), nn.BatchNorm1d(out)
    )


def simsiam_predictor(dim: int = 2048, hidden: int = 512) -> nn.Sequential:
    """Return SimSiam's predictor: dim -> hidden, BatchNorm, ReLU -> dim (Chen & He, CVPR 2021)."""
    return nn.Sequential(*_layer(dim, hidden), nn.Linear(hidden, dim))


def _layer(dim: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)
