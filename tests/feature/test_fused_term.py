"""The kernels of the feature term: under Triton's interpreter they give what PyTorch's operations give."""

import ast
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfr
import sfr.feature.batched
import sfr.feature.emd
import sfr.feature.term
import sfr.labels.on_a_device
from sfr.feature.results import Terms
from sfr.feature.term import feature_terms
from sfr.transport import solve
from sfr.transport.fallback import OptionalSolver

pytest.importorskip("triton")
from devices import OnItsDevice, StepWithoutMemory, pass_for_a_device
from gpu_not_there import run_for_a_gpu

import sfr.labels.fused
import sfr.transport.fused
from sfr.feature import fused

term = sfr.feature.term
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's interpreter runs the kernels
OUR_KERNELS = ("pool_kernel", "cost_kernel", "gradient_kernel", "join_kernel")


@pytest.fixture(autouse=True)
def _few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both ways solve with three iterations, for the interpreter is slow."""
    monkeypatch.setattr(fused, "ITERATIONS", 3)
    monkeypatch.setattr(fused, "BLOCK_C", 16)
    for module in (sfr.feature.emd, sfr.feature.batched):
        monkeypatch.setattr(module, "solve", functools.partial(solve, iterations=3))


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let maps in the CPU's memory, or without any, pass for those of a CUDA device."""
    monkeypatch.setattr(term, "fused_values", OptionalSolver("triton", term._load_fused, term.fused_values.failure))
    monkeypatch.setattr(sfr.labels.on_a_device.label_kernels, "given_up", False)
    pass_for_a_device(monkeypatch)


def terms_of(maps: Mapping[str, Tensor], max_grid: int, **options: Any) -> Terms:
    with pytest.MonkeyPatch.context() as patch:
        pass_for_a_device(patch)
        return feature_terms(maps, max_grid=max_grid, solver="proximal", **options)


def leaves(*shapes: tuple[int, ...], last: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.randn(2, *shape, device=DEVICE).to(dtype) for shape in shapes]
    if last:
        made = [each.to(memory_format=torch.channels_last) if each.ndim == 4 else each for each in made]
    return [each.requires_grad_() for each in made]


CASES = {
    "wider to the deep end, two sizes of grids": ([(4, 5, 5), (6, 3, 2), (12, 1, 2)], 2, False),
    "narrower to the deep end, channels last": ([(11, 4, 4), (5, 3, 3)], 2, True),
    "more channels than a block, tokens": ([(20, 9), (18, 4)], 2, False),
    "vectors and a map": ([(8, 3, 3), (6,)], 2, False),
}


@pytest.mark.parametrize(("shapes", "max_grid", "last"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_pytorchs_operations(shapes: Any, max_grid: int, last: bool) -> None:
    own = leaves(*shapes, last=last)
    maps = {str(i): leaf * 1.5 for i, leaf in enumerate(own)}
    expected = terms_of(maps, max_grid, kernels=False)
    joined = terms_of(maps, max_grid, joining=list(maps))
    found = terms_of(maps, max_grid)
    assert "Fused" in found.by_image.grad_fn.name()  # type: ignore[union-attr]
    assert set(found.names) == set(expected.names)
    for name, term_of_pair in expected.items():
        torch.testing.assert_close(found[name].values, term_of_pair.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].distance, term_of_pair.distance, rtol=1e-5, atol=1e-6)
    weights = dict(zip(expected.names, torch.rand(len(expected), 2, device=DEVICE), strict=True))

    def gradients(terms: Terms) -> tuple[Tensor, ...]:
        feature = torch.stack([(terms[name].values * weights[name]).sum() for name in terms]).sum()
        return torch.autograd.grad(feature + sum(each.sin().sum() for each in maps.values()), own, retain_graph=True)

    for of_plain, of_fused, of_joined in zip(*map(gradients, (expected, found, joined)), strict=True):
        torch.testing.assert_close(of_fused, of_plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_joined, of_plain, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_map_may_lie_in_memory_in_any_order() -> None:
    shallow, deep = leaves((4, 4, 6), (8, 2, 2))
    maps = {"0": shallow * 1.5, "1": deep * 1.5}
    expected, joined = terms_of(maps, 2, kernels=False), terms_of(maps, 2, joining=["0"])
    turned = maps["0"].transpose(2, 3).contiguous()
    own, plain = (
        torch.autograd.grad(each.by_image.sum() + turned.sin().sum(), shallow, retain_graph=True)[0]
        for each in (joined, expected)
    )
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_counts_for_nothing(value: float) -> None:
    shallow, deep = leaves((4, 4, 4), (6, 2, 2))
    sound = terms_of({"0": shallow, "1": deep}, 2)
    with torch.no_grad():
        shallow[1, 2, 0, 3] = value
    terms = terms_of({"0": shallow, "1": deep}, 2)
    assert terms.finite.tolist() == [[True, False]]
    assert terms.by_image[0, 1] == 0
    assert torch.equal(terms.by_image[0, 0], sound.by_image[0, 0])
    (gradient,) = torch.autograd.grad(terms.by_image.sum(), shallow)
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert not gradient[1].any()


# Numbers are tried as they are first; numpy, by which the interpreter computes, warns of what the kernel then discards.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(("scale", "deep_scale"), [(1e30, 1e-30), (1e-30, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_any_scale_is_as_good_as_another(scale: float, deep_scale: float) -> None:
    shallow, deep = leaves((4, 2, 2), (6, 2, 2))
    maps = {"0": shallow * scale, "1": deep * deep_scale}
    expected, found = terms_of(maps, 2, kernels=False), terms_of(maps, 2)
    torch.testing.assert_close(found.by_image, expected.by_image, rtol=1e-5, atol=1e-6)
    own, plain = (torch.autograd.grad(each.by_image.sum(), shallow, retain_graph=True)[0] for each in (found, expected))
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


def test_the_gradient_can_be_differentiated() -> None:
    shallow, deep = leaves((4, 3, 3), (6, 2, 2))
    second = []
    for kernels in (True, False):
        terms = terms_of({"0": shallow, "1": deep}, 2, kernels=kernels)
        (first,) = torch.autograd.grad(terms.by_image.sum(), shallow, create_graph=True)
        second += torch.autograd.grad(first.square().sum(), shallow)
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("on_a_device")
def test_a_step_of_half_precision_gives_the_loss_and_the_gradients_of_one_without_kernels(
    make_net: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net().to(DEVICE, torch.bfloat16)
    images, labels = torch.randn(2, 3, 12, 12, device=DEVICE, dtype=torch.bfloat16), torch.tensor([1, 2], device=DEVICE)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(term.fused_values, "given_up", not kernels)
        model = sfr.SFRWrapper(net)
        criterion = sfr.SFRLoss(model, feature_weight=100.0, max_grid=2, solver="proximal", gate="none")
        loss = criterion(model(images), labels)
        loss.backward()
        results.append((loss.detach(), criterion.last.feature, [each.grad.clone() for each in net.parameters()]))
        net.zero_grad()
        model.unwrap()
    (loss, feature, gradients), (plain_loss, plain_feature, plain_gradients) = results
    torch.testing.assert_close(feature, plain_feature, rtol=0.01, atol=0.0)
    torch.testing.assert_close(loss, plain_loss, rtol=0.01, atol=0.0)
    for own, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(own, plain, rtol=0.05, atol=0.02 * float(plain.abs().max()))


@pytest.mark.usefixtures("on_a_device")
def test_kernels_that_do_not_start_are_replaced_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("no compiler")

    maps = dict(enumerate(leaves((4, 4, 4), (6, 2, 2))))
    named = {str(name): each for name, each in maps.items()}
    monkeypatch.setattr(fused, "pool_kernel", Broken())
    with pytest.warns(UserWarning, match=r"fused feature term does not run here.*no compiler"):
        first = feature_terms(named, solver="proximal")
    second = feature_terms(named, solver="proximal")
    assert torch.equal(first.by_image, second.by_image)
    assert first.by_image.any()


@pytest.mark.usefixtures("on_a_device")
def test_kernels_are_launched_on_the_device_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = OnItsDevice(monkeypatch)
    for name in OUR_KERNELS[:3]:
        monkeypatch.setattr(fused, name, kernel)
    monkeypatch.setitem(fused.fused_plan.__globals__, "proximal_kernel", kernel)
    feature_terms({"0": torch.randn(2, 4, 4, 4), "1": torch.randn(2, 6, 2, 2)}, solver="proximal")
    fused.fused_plan(torch.rand(2, 3, 3), None, None, beta=1.0, iterations=1)
    assert kernel.launches == 4


class Launches:
    """Stands in for the kernels and counts their launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        for name in OUR_KERNELS:
            monkeypatch.setattr(fused, name, _Counted(name, self.count))
        # Where it is called: a test that loads sfr.transport.fused anew leaves two modules of that name.
        called_in = fused.fused_plan.__globals__
        monkeypatch.setitem(called_in, "proximal_kernel", _Counted("proximal_kernel", self.count))
        monkeypatch.setattr(sfr.labels.fused, "fitted_kernel", _Counted("fitted_kernel", self.count))


class _Counted:
    def __init__(self, name: str, count: Counter[str]) -> None:
        self.name, self.count = name, count

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_: Any, **__: Any) -> None:
            self.count[self.name] += 1

        return launch


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("switches", [{}, {"gate": "none"}], ids=["gated", "open"])
def test_a_step_launches_a_dozen_kernels_more_for_four_stages(
    monkeypatch: pytest.MonkeyPatch, switches: dict[str, Any]
) -> None:
    """Counted without a GPU: neither operations nor kernels compute."""
    step, launches = StepWithoutMemory(**switches), Launches(monkeypatch)
    step()  # creates what is created once
    launches.count.clear()
    with_features = step() + launches.count.total()
    with step.model.disable():
        without = step()
    kernels = dict.fromkeys((*OUR_KERNELS[:3], "proximal_kernel"), 1) | {"join_kernel": 3}
    of_gate = {} if switches else {"fitted_kernel": 1}
    assert launches.count == kernels | of_gate
    assert with_features - without <= 12 + len(of_gate)


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"cost": "sqeuclidean"}, {}),
        ({"grouping": "segments"}, {}),
        ({"marginals": "cross"}, {}),
        ({"detach_deep": False}, {}),
        ({"max_grid": 9}, {"last": True}),
        ({}, {"dtype": torch.float64}),
    ],
    ids=["sqeuclidean", "segments", "cross", "attached", "more than 64 nodes", "float64"],
)
def test_what_the_kernels_cannot_do_is_done_by_pytorch(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], made: dict[str, Any]
) -> None:
    maps = {str(i): leaf for i, leaf in enumerate(leaves((4, 9, 9), (8, 9, 9), **made))}
    launches = Launches(monkeypatch)
    monkeypatch.setattr(sfr.transport.dispatch, "_fits_fused", lambda _: False)
    assert feature_terms(maps, solver="proximal", **options).by_image.any()
    assert not launches.count


LAUNCH = """
import torch
from sfr.feature.term import feature_terms

several, aligned = [(8, 9, 9), (16, 8), (70, 4, 4), (6,)], [(64, 8, 8), (16, 4, 4)]
for shapes, last, dtype, joining in (
    (several, False, torch.float32, ()),
    (several, False, torch.bfloat16, ("0", "1")),
    (aligned, True, torch.bfloat16, ("0",)),
):
    own = [torch.randn(2, *shape).to(dtype) for shape in shapes]
    own = [(each.to(memory_format=torch.channels_last) if last else each).requires_grad_() for each in own]
    maps = {str(i): leaf * 1.5 for i, leaf in enumerate(own)}
    terms = feature_terms(maps, solver="proximal", joining=joining)
    loss = terms.by_image.sum() + sum(each.float().sin().sum() for each in maps.values())
    torch.autograd.grad(loss, own)
print(dict(sorted(launches.items())))
"""


def test_the_kernels_start_on_gpus_that_are_not_there(tmp_path: Any) -> None:
    (line,) = run_for_a_gpu(LAUNCH, tmp_path)
    started = ast.literal_eval(line)
    assert {name: started[name] for name in OUR_KERNELS[:3]} == dict.fromkeys(OUR_KERNELS[:3], 3)
    assert started["join_kernel"] >= 3
    assert started["proximal_kernel"] >= 3
