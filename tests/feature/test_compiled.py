"""The compiled cosine distance is the one of PyTorch's operations, with the same gradient, or steps aside."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import sfr
from sfr.feature import compiled, emd
from sfr.transport import exact
from sfr.transport.fallback import OptionalSolver

pytest.importorskip("numba")


def nodes(seed, batch=6, count=16, width=8):
    generator = torch.Generator().manual_seed(seed)
    shallow, deep = (torch.randn(batch, count, width, generator=generator) for _ in range(2))
    return shallow, deep + shallow


def both(shallow, deep, weights=None):
    """Values and gradients by the compiled function, and by PyTorch's operations.

    The gradients are in units of their largest possible size, 1 / (N |node|): where two sides nearly agree a gradient
    is the small difference of unit vectors, and its rounding is that of these.
    """
    length = shallow.double().norm(dim=2, keepdim=True)
    unit = shallow.shape[1] * torch.maximum(length, 1e-3 * length.square().mean(dim=1, keepdim=True).sqrt())
    found = []
    ways = (
        lambda own: emd._compiled([(own, deep)], "auto")[0],
        lambda own: emd._planned([(own, deep)], "cosine", "uniform", "auto")[0],
    )
    for way in ways:
        own = shallow.clone().requires_grad_()
        values = way(own)
        (values * (torch.ones(len(values)) if weights is None else weights)).sum().backward()
        found.append((values.detach(), (own.grad * unit).float()))
    return found


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    count=st.sampled_from([1, 2, 3, 4, 9, 16, 49]),
    width=st.sampled_from([2, 7, 16, 33, 128]),
    exponent=st.sampled_from([-30, -10, 0, 10, 30]),
)
def test_value_and_gradient_are_those_of_the_operations(seed, batch, count, width, exponent):
    shallow, deep = nodes(seed, batch, count, width)
    assert_same(*both(shallow * 10.0**exponent, deep, weights=torch.rand(batch)))


def test_nodes_of_one_channel_have_two_directions():
    shallow, deep = nodes(11, width=1)
    (values, gradient), (expected, _) = both(shallow, deep)
    torch.testing.assert_close(values, expected)
    assert gradient.abs().max() < 1e-4


def test_the_value_is_the_least_of_all_permutations():
    shallow, deep = nodes(3, batch=20)
    unit = [(side / side.norm(dim=2, keepdim=True)).double() for side in (shallow, deep)]
    costs = 1 - (unit[0] @ unit[1].mT).numpy()
    least = [cost[linear_sum_assignment(cost)].mean() for cost in costs]
    np.testing.assert_allclose(emd._compiled([(shallow, deep)], "exact")[0], least, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["a short node", "nearly zero nodes", "equal sets", "one-hot nodes", "a common offset"]
)
def test_sets_that_are_hard_to_compare(kind):
    shallow, deep = nodes(1)
    if kind == "a short node":
        shallow[:, 0] *= 1e-5
        deep[:, 1] *= 1e-4
    elif kind == "nearly zero nodes":
        shallow[:, :15] *= 1e-20
    elif kind == "equal sets":
        deep = shallow[:, torch.randperm(16)].clone()
        deep[3:] += 0.05
    elif kind == "one-hot nodes":
        shallow = torch.eye(16).expand(6, 16, 16).contiguous()
        deep = shallow.roll(3, dims=1) + 0.1 * torch.rand(6, 16, 16)
    else:
        shallow, deep = shallow + 100, deep + 100
    found, expected = both(shallow, deep)
    if kind == "equal sets":  # of equal sets the gradient is rounding
        torch.testing.assert_close(found[0][:3], torch.zeros(3), rtol=0, atol=1e-6)
        found, expected = ([each[3:] for each in way] for way in (found, expected))
    assert_same(found, expected)


@pytest.mark.parametrize("side", [0, 1])
def test_a_set_of_zeros_has_a_bounded_value_and_no_gradient_of_its_own(side):
    sides = nodes(2)
    sides[side][0] = 0
    (values, gradient), (expected, _) = both(*sides)
    torch.testing.assert_close(values, expected)
    assert gradient[0].abs().max() < 1e-6
    assert gradient[1].abs().max() > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_an_image_that_is_not_finite_spoils_its_own_value_alone(value, side):
    sides = nodes(4)
    sides[side][2, 5, 1] = value
    (values, gradient), (expected, other) = both(*sides)
    spoilt = torch.arange(6) == 2
    assert values.isnan().equal(spoilt)
    assert expected.isnan().equal(spoilt)
    assert_same((values[~spoilt], gradient[~spoilt]), (expected[~spoilt], other[~spoilt]))


def test_it_repeats_bit_for_bit_and_threads_change_nothing(monkeypatch):
    shallow, deep = nodes(5, batch=40)
    once, again = (emd._compiled([(shallow, deep)], "auto")[0] for _ in range(2))
    assert torch.equal(once, again)
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "THREADED_FROM", 1)
    torch.set_num_threads(3)
    try:
        assert torch.equal(emd._compiled([(shallow, deep)], "auto")[0], once)
    finally:
        torch.set_num_threads(before)


def test_the_gradient_can_be_differentiated():
    shallow, deep = nodes(6, batch=2, count=4, width=5)
    found = []
    for way in (emd._compiled, lambda pairs, solver: emd._planned(pairs, "cosine", "uniform", solver)):
        own = shallow.clone().requires_grad_()
        [first] = torch.autograd.grad(way([(own, deep)], "auto")[0].sum(), own, create_graph=True)
        first.square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(*found)


def test_nodes_in_any_order_of_memory_are_taken():
    shallow, deep = nodes(7)
    expected = emd._compiled([(shallow, deep)], "auto")[0]
    turned = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in (shallow, deep)]
    assert torch.equal(emd._compiled([tuple(turned)], "auto")[0], expected)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.double(), b.double()),
        lambda a, b: (a, b[:, :4]),
        lambda a, b: (a, b.requires_grad_()),
        lambda a, b: (a.as_subclass(Subclass), b),
        lambda a, b: (a[:0], b[:0]),
        lambda a, b: (a.to("meta"), b.to("meta")),
    ],
    ids=["float64", "other size", "deep gradient", "subclass", "empty", "other device"],
)
def test_what_it_is_not_made_for_goes_the_other_way(change):
    assert not compiled.fits(*change(*nodes(8)))
    assert compiled.fits(*nodes(8))


@pytest.mark.parametrize(
    ("error", "told"), [(ModuleNotFoundError("no numba", name="numba"), 0), (OSError("no space left"), 1)]
)
def test_where_numba_fails_the_operations_take_its_place_with_one_warning(monkeypatch, error, told):
    def load():
        raise error

    monkeypatch.setattr(compiled, "compiled_distances", OptionalSolver("numba", load, "numba does not work here"))
    monkeypatch.setattr(exact, "compiled_assignment", OptionalSolver("numba", load, "numba does not work here"))
    shallow, deep = nodes(9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [sfr.emd_l2(shallow, deep, cost="cosine") for _ in range(2)]
    assert len([each for each in caught if "numba does not work here" in str(each.message)]) == told
    monkeypatch.undo()
    torch.testing.assert_close(values, [emd._compiled([(shallow, deep)], "auto")[0].mean()] * 2)
