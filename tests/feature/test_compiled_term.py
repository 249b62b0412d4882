"""The feature term of all pairs by one call on the CPU gives what PyTorch's operations give pair by pair."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scales import assert_alike, at_any_scale, maps_of
from torch import Tensor, nn

import sfr
from sfr.feature import compiled, compiled_term
from sfr.feature.results import Terms
from sfr.feature.term import feature_terms
from sfr.transport import exact
from sfr.transport.fallback import OptionalSolver

pytest.importorskip("numba")


class Calls:
    """Stands in for the compiled function, and counts its calls."""

    def __init__(self) -> None:
        self.count, self.found = 0, compiled.compiled_distances

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.found(*args)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    monkeypatch.setattr(compiled, "compiled_distances", counted)
    return counted


def by_operations(maps: dict[str, Tensor], **options: Any) -> Terms:
    """Return the terms without any compiled function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact.compiled_assignment, "given_up", True)
        return feature_terms(maps, **options)


def leaves(*shapes: tuple[int, ...], batch: int = 5) -> list[Tensor]:
    return [torch.randn(batch, *shape).requires_grad_() for shape in shapes]


def named(own: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): leaf * 1.5 for i, leaf in enumerate(own)}


CASES: dict[str, tuple[list[tuple[int, ...]], int]] = {
    "a ResNet of three stages": ([(16, 16, 16), (32, 8, 8), (64, 4, 4)], 1),
    "one of four, with nodes of three numbers": ([(8, 8, 8), (16, 4, 4), (32, 2, 2), (64, 1, 1)], 3),
    "windows that are not equal": ([(6, 9, 7), (18, 5, 5)], 1),
    "narrower to the deep end": ([(18, 5, 5), (6, 4, 4), (3, 4, 4)], 1),
    "tokens": ([(6, 9), (6, 9), (12, 9)], 1),
    "tokens and an image of as many nodes": ([(6, 16), (12, 4, 4)], 1),
    "vectors": ([(8,), (4,), (8,)], 1),
    "videos": ([(4, 4, 4, 4), (8, 3, 4, 4)], 1),
    "one channel": ([(1, 4, 4), (3, 4, 4)], 1),
}


@pytest.mark.parametrize("batch", [5, 1])
@pytest.mark.parametrize("pairs", ["all", "last", "adjacent"])
@pytest.mark.parametrize(("shapes", "sizes"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_pairs_one_by_one(
    calls: Calls, shapes: Any, sizes: int, pairs: Any, batch: int
) -> None:
    own = leaves(*shapes, batch=batch)
    maps = named(own)
    expected = by_operations(maps, pairs=pairs)
    assert calls.count == 0
    terms = feature_terms(maps, pairs=pairs)
    joined = feature_terms(maps, pairs=pairs, joining=list(maps))
    assert 2 <= calls.count <= 2 * sizes
    assert terms.names == joined.names == expected.names
    assert terms.finite.all()
    assert terms.finite.shape == (len(terms), batch)
    torch.testing.assert_close(terms.by_image, expected.by_image, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(terms.distances, expected.distances, rtol=1e-6, atol=2e-6)
    weights = torch.rand(len(terms), batch)

    def gradients(of: Terms) -> tuple[Tensor, ...]:
        loss = (of.by_image * weights).sum() + sum(each.sin().sum() for each in maps.values())
        return torch.autograd.grad(loss, own, retain_graph=True)

    for one_by_one, together, with_map in zip(*map(gradients, (expected, terms, joined)), strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(with_map, one_by_one, rtol=1e-5, atol=1e-5)


def test_a_step_makes_one_call_and_has_the_gradients_of_one_without_numba(
    make_net: Callable[..., nn.Module], batch: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, gradients = make_net(), []
    for given_up in (False, True):
        monkeypatch.setattr(exact.compiled_assignment, "given_up", given_up)
        model = sfr.SFRWrapper(net)
        sfr.SFRLoss(model, feature_weight=10.0)(model(batch[0]), batch[1]).backward()
        assert calls.count == 1
        gradients.append([each.grad.clone() for each in net.parameters()])
        net.zero_grad()
        model.unwrap()
    for together, one_by_one in zip(*gradients, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["shallow", "deep"])
def test_an_image_that_is_not_finite_counts_for_nothing(value: float, side: int) -> None:
    maps = {str(i): leaf.detach().requires_grad_() for i, leaf in enumerate(leaves((4, 4, 4), (8, 4, 4), (8, 4, 4)))}
    sound = feature_terms(maps)
    with torch.no_grad():
        maps[str(side)][1, 2, 0, 3] = value
    terms = feature_terms(maps)
    spoilt = torch.tensor([str(side) in name for name in terms.names])
    expected = torch.ones(3, 5, dtype=torch.bool)
    expected[spoilt, 1] = False
    assert torch.equal(terms.finite, expected)
    assert torch.equal(terms.finite, by_operations(maps).finite)
    assert torch.equal(terms.by_image, sound.by_image.where(expected, 0.0))
    for gradient in torch.autograd.grad(terms.by_image[spoilt].sum(), maps["0"]):
        assert gradient.isfinite().all()
        assert gradient[0].any()
        assert not gradient[1].any()


@at_any_scale
def test_any_scale_is_as_good_as_another(scale: float, deep_scale: float) -> None:
    maps = maps_of(scale, deep_scale)
    assert_alike(feature_terms(maps), by_operations(maps), maps["0"], scale)


def test_the_gradient_can_be_differentiated() -> None:
    own = leaves((8, 5, 5), (4, 4, 4), (8, 4, 4), batch=2)
    second = []
    for terms_of in (feature_terms, by_operations):
        terms = terms_of({str(i): leaf * 1 for i, leaf in enumerate(own)})
        first = torch.autograd.grad(terms.by_image.sum(), own[:2], create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), own[:2]))
    for together, one_by_one in zip(*second, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)
        assert together.any()


def test_it_repeats_bit_for_bit_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = leaves((8, 8, 8), (16, 4, 4), (32, 4, 4), batch=40)
    before, found = torch.get_num_threads(), []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        monkeypatch.setattr(compiled, "THREADED_FROM", 1)
        terms = feature_terms(dict(zip("abc", own, strict=True)))
        found.append((terms.by_image, *torch.autograd.grad(terms.by_image.sum(), own[:2])))
        torch.set_num_threads(before)
    for first, again, threaded in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, threaded)


def test_a_deep_side_alone_gets_no_gradient() -> None:
    shallow, deep = leaves((4, 4, 4), (8, 4, 4))
    assert not feature_terms({"0": shallow.detach(), "1": deep}).by_image.requires_grad
    by_image = feature_terms({"0": shallow, "1": deep}).by_image
    assert torch.autograd.grad(by_image.sum(), [shallow, deep], allow_unused=True)[1] is None


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, [(8, 4, 4), (12, 4, 4)]),
        ({}, [(8, 9), (8, 4, 4)]),
        ({"cost": "sqeuclidean"}, None),
        ({"cost": "correlation"}, None),
        ({"marginals": "cross"}, None),
        ({"solver": "proximal"}, None),
        ({"solver": "sinkhorn"}, None),
        ({"matching": "in_place"}, None),
        ({"detach_deep": False}, None),
    ],
    ids=[
        "widths that do not divide", "another number of nodes", "sqeuclidean", "correlation", "cross", "proximal",
        "sinkhorn", "in place", "deep gradient",
    ],
)  # fmt: skip
def test_what_one_call_cannot_do_is_done_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], shapes: Any
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("one call for all pairs")

    monkeypatch.setattr(sfr.feature.term, "compiled_values", never)
    assert feature_terms(named(leaves(*(shapes or [(8, 4, 4), (16, 4, 4)]))), **options).by_image.any()


@pytest.mark.parametrize(
    "change",
    [Tensor.double, Tensor.bfloat16, lambda each: each.as_subclass(Subclass)],
    ids=["float64", "bfloat16", "subclass"],
)
def test_other_tensors_are_taken_pair_by_pair(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(sfr.feature.term, "compiled_values", None)
    maps = {name: change(each) for name, each in named(leaves((8, 4, 4), (16, 4, 4))).items()}
    assert feature_terms(maps).by_image.any()


@pytest.mark.parametrize(
    ("error", "told"), [(ModuleNotFoundError("no numba", name="numba"), 0), (OSError("no space left"), 1)]
)
def test_where_numba_fails_the_operations_take_its_place_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: int
) -> None:
    def load() -> Any:
        raise error

    monkeypatch.setattr(compiled, "compiled_distances", OptionalSolver("numba", load, "numba does not work here"))
    monkeypatch.setattr(exact, "compiled_assignment", OptionalSolver("numba", load, "numba does not work here"))
    own = leaves((8, 8, 8), (16, 4, 4))
    maps = named(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [feature_terms(maps, joining=["0"]) for _ in range(2)]
        gradient = torch.autograd.grad(found[0].by_image.sum() + maps["0"].sin().sum(), own[0], retain_graph=True)[0]
    assert len([each for each in caught if "numba does not work here" in str(each.message)]) == told
    monkeypatch.undo()
    expected = feature_terms(maps)
    torch.testing.assert_close(found[1].by_image, expected.by_image)
    [plain] = torch.autograd.grad(expected.by_image.sum() + maps["0"].sin().sum(), own[0])
    torch.testing.assert_close(gradient, plain)


def test_a_default_device_is_of_no_account() -> None:
    """Stages of two sizes, whose pairs come from two calls, in order."""
    maps = {"a": torch.randn(4, 8, 40), "b": torch.randn(4, 16, 20), "c": torch.randn(4, 16, 9)}
    expected = feature_terms(maps)
    with torch.device("meta"):
        found = feature_terms(maps)
    assert torch.equal(found.by_image, expected.by_image)


def test_stages_of_very_unequal_widths_are_taken_pair_by_pair(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call each set and each gradient would be as wide as the widest."""
    monkeypatch.setattr(compiled_term, "AT_ONCE_UP_TO", 2 * 16 * (3 * 32 + 3 * 8))
    own = leaves((8, 4, 4), (8, 4, 4), (32, 4, 4), batch=2)
    assert len(feature_terms(named(own))) == 3
    assert calls.count == 1
    own = leaves((8, 4, 4), (8, 4, 4), (32, 4, 4), batch=3)
    assert len(feature_terms(named(own))) == 3
    assert calls.count == 1 + 3


def test_a_deep_map_may_change_before_the_backward_pass() -> None:
    shallow, deep = leaves((4, 4, 4), (8, 4, 4))
    maps = {"0": shallow * 1, "1": deep * 1}
    (expected,) = torch.autograd.grad(feature_terms(maps).by_image.sum(), maps["0"])
    values = feature_terms(maps).by_image.sum()
    maps["1"].detach().add_(1)
    (gradient,) = torch.autograd.grad(values, maps["0"])
    assert torch.equal(gradient, expected)


OF_A_STEP = """
import hashlib, torch
from sfr.feature.term import feature_terms
torch.manual_seed(0)
maps = {str(i): torch.randn(8, c, s, s).requires_grad_() for i, (c, s) in enumerate([(16, 16), (32, 8), (64, 4)])}
feature_terms(maps).by_image.sum().backward()
print(hashlib.sha1(b"".join(maps[name].grad.numpy().tobytes() for name in "01")).hexdigest())
"""


def test_the_process_that_compiles_finds_what_the_later_ones_find(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(
            [sys.executable, "-c", OF_A_STEP], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))  # which the second one read
    assert found[0] == found[1]
