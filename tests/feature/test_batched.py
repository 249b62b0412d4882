"""All pairs as one batch, for devices without Triton: what the pairs give one by one, in few launches."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import StepWithoutMemory, pass_for_a_device
from scales import assert_alike, at_any_scale, maps_of
from torch import Tensor, nn

import sfr
import sfr.feature.term
import sfr.transport.dispatch as dispatch
from sfr.feature.results import Terms
from sfr.feature.term import feature_terms
from sfr.labels.on_a_device import label_kernels
from sfr.transport import default_solver
from sfr.transport.exact import compiled_assignment

term = sfr.feature.term


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(term.fused_values, "given_up", True)
    monkeypatch.setattr(dispatch.fused_solver, "given_up", True)


def terms_of(maps: dict[str, Tensor], *, on_device: bool, **options: Any) -> Terms:
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            pass_for_a_device(patch)
        terms = feature_terms(maps, **options)
    assert on_device == any(name in terms.by_image.grad_fn.name() for name in ("Batch", "Cat"))  # type: ignore[union-attr]
    return terms


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, *shape).to(dtype).requires_grad_() for shape in shapes]


CASES: dict[str, list[tuple[int, ...]]] = {
    "wider to the deep end": [(8, 8, 8), (16, 6, 6), (32, 4, 4)],
    "grids of two sizes": [(8, 8, 8), (16, 4, 4), (32, 4, 4), (64, 2, 2)],
    "widths that are no multiples": [(8, 5, 5), (20, 4, 4), (30, 4, 4)],
    "narrower to the deep end": [(16, 5, 5), (7, 4, 4), (4, 4, 4)],
    "tokens": [(6, 9), (6, 9), (12, 9)],
    "vectors": [(8,), (6,), (8,)],
    "videos": [(4, 4, 4, 4), (6, 3, 4, 4)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pairs", ["all", "last"])
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_pairs_one_by_one(shapes: Any, pairs: Any, dtype: torch.dtype) -> None:
    own = leaves(*shapes, dtype=dtype)
    maps = {str(i): leaf * 1 for i, leaf in enumerate(own)}
    expected, found = (terms_of(maps, on_device=on_device, pairs=pairs) for on_device in (False, True))
    assert set(found.names) == set(expected.names)
    weights = {name: torch.rand(3) for name in expected}
    of_both = []
    for terms in (expected, found):
        value = torch.stack([(terms[name].values * weights[name]).sum() for name in expected]).sum()
        of_both.append(torch.autograd.grad(value, own, allow_unused=True, retain_graph=True))
    for name in expected:
        torch.testing.assert_close(found[name].values, expected[name].values, rtol=1e-5, atol=1e-6)
        assert found[name].finite.all()
    rounding = 1e-6 if dtype == torch.float32 else 1e-3
    for one_by_one, batched in zip(*of_both, strict=True):
        assert (one_by_one is None) == (batched is None)
        if batched is not None:
            torch.testing.assert_close(batched, one_by_one, rtol=rounding * 10, atol=rounding)
    assert any(each is not None and each.any() for each in of_both[1])


def test_a_pair_given_twice_in_another_order_counts_as_before() -> None:
    own = leaves((8, 4, 4), (8, 4, 4), (16, 4, 4))
    pairs = [("0", "2"), ("1", "2"), ("0", "1")]
    maps = {str(i): leaf * 1 for i, leaf in enumerate(own)}
    gradients = []
    for on_device in (False, True):
        terms = terms_of(maps, on_device=on_device, pairs=pairs)
        gradients.append(torch.autograd.grad(terms.by_image.sum(), own[:2], retain_graph=True))
    for one_by_one, batched in zip(*gradients, strict=True):
        torch.testing.assert_close(batched, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["shallow", "deep"])
@pytest.mark.parametrize("scale", [1.0, 1e-36])
def test_an_image_that_is_not_finite_counts_for_nothing(value: float, side: int, scale: float) -> None:
    own = [leaf.detach().mul(scale).requires_grad_() for leaf in leaves((4, 4, 4), (8, 4, 4))]
    maps = {str(i): leaf * 1 for i, leaf in enumerate(own)}
    sound = terms_of(maps, on_device=True)
    with torch.no_grad():
        maps[str(side)][1, 2, 0, 3] = value
    terms = terms_of(maps, on_device=True)
    assert terms.finite.tolist() == [[True, False, True]]
    assert terms.by_image[0, 1] == 0
    assert torch.equal(terms.by_image[0, [0, 2]], sound.by_image[0, [0, 2]])
    (gradient,) = torch.autograd.grad(terms.by_image.sum(), maps["0"])
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert gradient[0].any()


@at_any_scale
def test_any_scale_is_as_good_as_another(scale: float, deep_scale: float) -> None:
    maps = maps_of(scale, deep_scale)
    expected, found = (terms_of(maps, on_device=on_device) for on_device in (False, True))
    assert_alike(found, expected, maps["0"], scale)


def test_the_gradient_can_be_differentiated() -> None:
    own = leaves((4, 5, 5), (8, 4, 4), (4, 2, 2))
    second = []
    for on_device in (True, False):
        terms = terms_of({str(i): leaf * 1 for i, leaf in enumerate(own)}, on_device=on_device)
        first = torch.autograd.grad(terms.by_image.sum(), own[:2], create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), own[:2]))
    for batched, one_by_one in zip(*second, strict=True):
        torch.testing.assert_close(batched, one_by_one, rtol=1e-4, atol=1e-6)
        assert batched.any()


def test_a_step_has_the_gradients_of_one_on_the_cpu(make_net: Callable[..., nn.Module], batch: Any) -> None:
    net, gradients = make_net(), []
    for on_device in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if on_device:
                pass_for_a_device(patch)
                patch.setattr(label_kernels, "given_up", True)
            model = sfr.SFRWrapper(net)
            criterion = sfr.SFRLoss(model, feature_weight=10.0)
            criterion(model(batch[0]), batch[1]).backward()
        gradients.append([each.grad.clone() for each in net.parameters()])
        net.zero_grad()
        model.unwrap()
    for on_cpu, batched in zip(*gradients, strict=True):
        torch.testing.assert_close(batched, on_cpu, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["none", "fitted"])
def test_a_step_launches_sixty_kernels_more_for_four_stages(
    monkeypatch: pytest.MonkeyPatch, gate: str, dtype: torch.dtype
) -> None:
    """Counted without a GPU; one pair at a time it was 405, and 1,587 with the plans."""
    pytest.importorskip("numba")
    pass_for_a_device(monkeypatch)
    monkeypatch.setattr(label_kernels, "given_up", True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device
    step = StepWithoutMemory(dtype, gate=gate)
    step()  # creates what is created once
    with_features = step()
    with step.model.disable():
        without = step()
    of_gate = 0 if gate == "none" else 5 if dtype == torch.float32 else 8
    assert 12 < with_features - without <= 60 + of_gate


@pytest.mark.parametrize(
    ("device", "nodes", "solver"),
    [("cpu", 64, "exact"), ("mps", 16, "exact"), ("mps", 17, "proximal"), ("xpu", 16, "exact")],
)
def test_small_problems_of_a_device_without_triton_are_solved_on_the_cpu(device: str, nodes: int, solver: str) -> None:
    assert default_solver(torch.device(device), nodes) == solver


def test_problems_stay_on_the_device_where_triton_runs_or_numba_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_assignment, "given_up", True)
    assert default_solver(torch.device("mps"), 16) == "proximal"
    monkeypatch.setattr(compiled_assignment, "given_up", False)
    monkeypatch.setattr(dispatch.fused_solver, "given_up", False)
    assert default_solver(torch.device("cuda"), 16) == "proximal"


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_cuda_graph_records_does_not_wait_for_the_cpu(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    assert default_solver(torch.device("cuda"), 16) == ("proximal" if captured else "exact")
