"""Features of any scale: what the ways to the feature term must agree on."""

import pytest
import torch
from torch import Tensor

from sfr.feature.results import Terms

at_any_scale = pytest.mark.parametrize(
    ("scale", "deep_scale"), [(1e30, 1e-30), (1e-30, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-40, 1.0)]
)


def maps_of(scale: float, deep_scale: float) -> dict[str, Tensor]:
    """Two maps, of whose shallow one a node is almost zero beside the others."""
    shallow, deep = (torch.randn(3, width, 4, 4) for width in (4, 8))
    shallow[0, :, 0, 0] *= 1e-5
    return {"0": shallow.requires_grad_() * scale, "1": deep.requires_grad_() * deep_scale}


def assert_alike(found: Terms, expected: Terms, shallow: Tensor, scale: float) -> None:
    """The values are the same, and the gradients with respect to the shallow map."""
    torch.testing.assert_close(found.by_image, expected.by_image, rtol=1e-5, atol=1e-6)
    own, plain = (torch.autograd.grad(each.by_image.sum(), shallow, retain_graph=True)[0] for each in (found, expected))
    torch.testing.assert_close(own * scale, plain * scale, rtol=1e-4, atol=1e-6)
