"""Pooling whose gradient joins that of the map: cells and gradients are those of PyTorch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfr
from sfr.feature.pooling import pool

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
SHAPES = [
    ((16,), (5,)),
    ((8, 8), (4, 4)),
    ((16, 24), (4, 4)),
    ((17, 19), (4, 4)),
    ((32, 32), (1, 3)),
    ((32, 48), (4, 4)),
    ((6, 5, 4), (2, 2, 2)),
]
every_shape = pytest.mark.parametrize(("spatial", "grid"), SHAPES, ids=str)
every_format = pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])


def a_map(spatial: tuple[int, ...], last: bool, seed: int = 0) -> Tensor:
    values = torch.randn(2, 3, *spatial, generator=torch.Generator().manual_seed(seed))
    if last:
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    return values.requires_grad_()


def both(spatial: tuple[int, ...], grid: tuple[int, ...], last: bool, then: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `then` makes of (leaf, map, cells), with our pooling and with PyTorch's."""
    results = []
    for ours in (True, False):
        leaf = a_map(spatial, last)
        feature_map = leaf * 2
        cells = pool(feature_map, grid, joining=True) if ours else POOLS[len(grid)](feature_map, grid).flatten(2)
        results.append(then(leaf, feature_map, cells))
    return results[0], results[1]


def assert_same(results: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_shape
@every_format
def test_cells_and_gradients_are_those_of_adaptive_pooling(spatial: Any, grid: Any, last: bool) -> None:
    def backward(leaf: Tensor, feature_map: Tensor, cells: Tensor) -> list[Tensor]:
        (feature_map.sin().sum() + cells.square().sum()).backward()
        assert leaf.grad is not None
        return [cells, leaf.grad]

    assert_same(both(spatial, grid, last, backward))


@every_shape
def test_the_gradient_of_the_map_itself_can_be_asked_for(spatial: Any, grid: Any) -> None:
    def gradients(leaf: Tensor, feature_map: Tensor, cells: Tensor) -> list[Tensor]:
        feature_map.retain_grad()
        loss = feature_map.sin().sum() + cells.square().sum()
        (of_map,) = torch.autograd.grad(loss, feature_map, retain_graph=True)
        loss.backward()
        assert leaf.grad is not None
        assert feature_map.grad is not None
        return [of_map, feature_map.grad, leaf.grad]

    assert_same(both(spatial, grid, False, gradients))


def test_a_second_backward_pass_over_the_same_graph_adds_the_same_again() -> None:
    def twice(leaf: Tensor, feature_map: Tensor, cells: Tensor) -> list[Tensor]:
        loss = feature_map.sin().sum() + cells.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert leaf.grad is not None
        return [leaf.grad]

    assert_same(both((16, 16), (4, 4), False, twice))


def test_what_a_pass_leaves_that_does_not_reach_the_map_comes_into_no_other() -> None:
    """A gradient for what comes after the map alone runs neither hook nor pooling of maps before it."""

    def passes(leaf: Tensor, feature_map: Tensor, cells: Tensor) -> list[Tensor]:
        later = feature_map * 3
        ours = cells.grad_fn is not None and "Joining" in cells.grad_fn.name()
        of_later = pool(later, (4, 4), joining=True) if ours else F.adaptive_avg_pool2d(later, 4).flatten(2)
        loss = later.sin().sum() + (cells * of_later).sum()
        first = torch.autograd.grad(loss, later, retain_graph=True)[0]
        second = torch.autograd.grad(feature_map.cos().sum(), leaf, retain_graph=True)[0]
        return [first, second, torch.autograd.grad(loss, leaf)[0]]

    assert_same(both((16, 16), (4, 4), False, passes))


def test_the_gradient_can_be_differentiated() -> None:
    def second_order(leaf: Tensor, feature_map: Tensor, cells: Tensor) -> list[Tensor]:
        loss = feature_map.sin().sum() + cells.pow(3).sum()
        gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
        return list(torch.autograd.grad(gradient.square().sum(), leaf))

    for spatial, last in (((16, 16), False), ((6, 7), False), ((16, 16), True)):
        assert_same(both(spatial, (3, 3) if spatial == (6, 7) else (4, 4), last, second_order))


def test_where_nothing_needs_a_gradient_no_hook_is_set() -> None:
    assert pool(torch.ones(2, 3, 8, 8), (4, 4), joining=True).grad_fn is None
    with torch.no_grad():
        assert pool(a_map((8, 8), False), (4, 4), joining=True).grad_fn is None


class Stopped(torch.autograd.Function):
    """The identity without a gradient, which PyTorch's graph does not show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class Net(nn.Module):
    """Three stages; what the classifier takes of the middle one is without gradient if `stop` says so."""

    def __init__(self, stop: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head, self.stop = nn.Linear(8, 5), stop

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(self.a(x))
        return self.head(self.c(self.stop(b) if self.stop else b).mean(dim=(2, 3)))


def gradients(stop: Any, **arguments: Any) -> list[Tensor]:
    torch.manual_seed(0)
    net = Net(stop)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    model = sfr.SFRWrapper(net, stages=["a", "b", "c"])
    sfr.SFRLoss(model, **arguments)(model(x), y).backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("stop", [None, torch.detach], ids=["whole", "detached"])
def test_a_loss_of_ones_own_which_pools_as_pytorch_does_gives_the_same_gradients(stop: Any) -> None:
    joined = gradients(stop, gate="none")
    plain = gradients(stop, label_loss=nn.CrossEntropyLoss())
    assert len(joined) == len(plain) == 8
    for ours, theirs in zip(joined, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_the_model_stops_where_the_graph_does_not_show_it_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"label_loss=nn\.CrossEntropyLoss"):
        gradients(Stopped.apply)
    assert len(gradients(Stopped.apply, label_loss=nn.CrossEntropyLoss())) == 8


class Halves(nn.Module):
    """Its second stage is one output of a node of two, and the classifier takes that one or the other."""

    def __init__(self, taken: int) -> None:
        super().__init__()
        self.a, self.b, self.part = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Identity()
        self.head, self.taken = nn.Linear(8, 5), taken

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(self.a(x))
        first, second = torch.stack([b, b.sin()]).unbind()
        return self.head((self.part(first), second)[self.taken].mean(dim=(2, 3)))


@pytest.mark.parametrize("taken", [0, 1])
def test_an_output_whose_twin_alone_leads_to_the_logits_gets_its_gradient_all_the_same(taken: int) -> None:
    def of(**arguments: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = sfr.SFRWrapper(Halves(taken), stages=["a", "part"])
        images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
        sfr.SFRLoss(model, detach_deep=False, **arguments)(model(images), target).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for ours, plain in zip(of(gate="none"), of(label_loss=nn.CrossEntropyLoss()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
