"""Moments in batches against those of the whole, and their principal axes against ``torch.linalg.svd``."""

import pytest
import torch
from torch import Tensor

from sfr.pretrain.moments import Moments


def vectors(count: int = 200, width: int = 7, seed: int = 0) -> Tensor:
    """Correlated features, far from zero and of unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix * torch.logspace(1, -2, width) + 50


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_moments_do_not_depend_on_the_batches(size: int) -> None:
    whole = vectors().double()
    moments = moments_of(*vectors().split(size))
    deviations = whole - whole.mean(dim=0)
    assert moments.count == 200
    torch.testing.assert_close(moments.mean, whole.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.scatter, deviations.T @ deviations, rtol=1e-9, atol=1e-9)


def test_no_digits_are_lost_far_from_zero() -> None:
    spread = torch.randn(1000, 3, dtype=torch.float64)
    near, far = moments_of(*spread.split(10)), moments_of(*(spread + 1e7).split(10))
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [200, 5, 1])
def test_principal_axes_are_those_of_the_svd_of_the_whole(count: int) -> None:
    whole = vectors(count)
    values, axes = moments_of(*whole.split(3)).principal_axes()
    deviations = whole.double() - whole.double().mean(dim=0)
    _, expected_values, expected_axes = torch.linalg.svd(deviations)
    rank = min(count - 1, 7)
    scale = max(expected_values[0].item(), 1.0)
    torch.testing.assert_close(values[:rank], expected_values[:rank], rtol=1e-4, atol=1e-6 * scale)
    assert (values[rank:] < 1e-4 * scale).all()
    cosines = (axes[:, :rank] * expected_axes[:rank].T).sum(dim=0).abs()
    torch.testing.assert_close(cosines, torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(axes.T @ axes, torch.eye(7, dtype=torch.float64))


def test_axes_point_to_where_their_largest_component_is_positive() -> None:
    for seed in range(5):
        _, axes = moments_of(vectors(seed=seed)).principal_axes()
        assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_empty_batch_changes_nothing() -> None:
    moments = moments_of(torch.empty(0, 7), vectors(), torch.empty(0, 7))
    assert moments.count == 200
    assert torch.equal(moments.scatter, moments_of(vectors()).scatter)
