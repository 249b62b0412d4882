"""The Triton kernel: its plans under Triton's interpreter against the eager solver's, and its compilation for GPUs."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sfr.transport import solve
from sfr.transport.fallback import OptionalSolver
from sfr.transport.proximal import proximal_plan

pytest.importorskip("triton")
from gpu_not_there import run_for_a_gpu

from sfr.transport import fused

dispatch = sys.modules[solve.__module__]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's interpreter runs the kernel


def fused_plan(cost: Tensor, a: Tensor | None, b: Tensor | None, **options: Any) -> Tensor:
    given = (None if tensor is None else tensor.to(DEVICE) for tensor in (a, b))
    return fused.fused_plan(cost.to(DEVICE), *given, **options).cpu()


def costs(batch: int, n: int, m: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    shallow, deep = (torch.randn(batch, size, 32, generator=draws) for size in (n, m))
    return torch.cdist(shallow, deep).square() / 32


def masses(batch: int, size: int, seed: int) -> Tensor:
    found = torch.rand(batch, size, generator=torch.Generator().manual_seed(seed)) + 0.05
    return found / found.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (9, 20), (1, 5), (33, 64), (64, 64)])
@pytest.mark.parametrize("given", [False, True])
def test_plans_are_those_of_the_eager_solver(n: int, m: int, given: bool) -> None:
    cost = costs(2, n, m)
    a, b = (masses(2, n, 1), masses(2, m, 2)) if given else (None, None)
    found = fused_plan(cost, a, b, beta=2.0, iterations=60)
    rows, columns = (torch.full((2, n), 1 / n), torch.full((2, m), 1 / m)) if not given else (a, b)
    expected, _ = proximal_plan(cost, rows, columns, beta=2.0, iterations=60)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 / n)


@pytest.mark.skipif(DEVICE != "cpu", reason="a compiled kernel keeps its constants")
def test_a_problem_ends_early_once_its_cost_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = costs(1, 8, 8)
    twenty, sixty = (fused_plan(cost, None, None, beta=1.0, iterations=k) for k in (20, 60))
    assert not torch.equal(twenty, sixty)
    monkeypatch.setattr(fused, "UNCHANGED", 1e9)  # settled at the second look
    assert torch.equal(fused_plan(cost, None, None, beta=1.0, iterations=60), twenty)


def test_ending_early_leaves_the_plan_as_it_is() -> None:
    cost = costs(1, 12, 12)
    cost[:, range(12), range(12)] = 0.0  # settles soon
    plan = fused_plan(cost, None, None, beta=1.0, iterations=10**7)  # would take hours without
    torch.testing.assert_close(plan, torch.eye(12)[None] / 12, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e30, 1e36])
def test_the_scale_of_the_cost_changes_no_plan(scale: float) -> None:
    cost = costs(2, 6, 6).mul(8).round()  # scales exactly, also where float32 has few digits left
    expected = fused_plan(cost, None, None, beta=1.0, iterations=30)
    scaled = (scale * cost.double()).float()
    torch.testing.assert_close(fused_plan(scaled, None, None, beta=1.0, iterations=30), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.0, -1.0])
def test_any_scale_gives_a_feasible_plan(scale: float) -> None:
    plan = fused_plan(scale * costs(1, 7, 9), None, None, beta=1.0, iterations=20)
    torch.testing.assert_close(plan.sum(dim=2), torch.full((1, 7), 1 / 7))
    torch.testing.assert_close(plan.sum(dim=1), torch.full((1, 9), 1 / 9))
    assert (plan >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_not_finite_gets_the_independent_coupling(value: float) -> None:
    cost = costs(2, 4, 5)
    expected = fused_plan(cost, None, None, beta=1.0, iterations=20)
    cost[0, 2, 3] = value
    plan = fused_plan(cost, None, None, beta=1.0, iterations=20)
    torch.testing.assert_close(plan[0], torch.full((4, 5), 1 / 20))
    assert torch.equal(plan[1], expected[1])


def test_masses_keep_their_sum_and_empty_nodes_send_nothing() -> None:
    a, b = 3 * masses(2, 4, 1), 3 * masses(2, 5, 2)
    a[0, 1] = 0.0
    a[0] *= 3 / a[0].sum()
    a[1], b[1] = 0.0, 0.0
    plan = fused_plan(costs(2, 4, 5), a, b, beta=2.0, iterations=20)
    torch.testing.assert_close(plan.sum(dim=2), a)
    torch.testing.assert_close(plan.sum(dim=1), b)
    assert not plan[0, 1].any()


def test_layout_precision_and_empty_batches_are_no_matter() -> None:
    cost = costs(2, 6, 8)
    expected = fused_plan(cost, None, None, beta=1.0, iterations=10)
    strided = cost.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(fused_plan(strided, None, None, beta=1.0, iterations=10), expected)
    half = fused_plan(cost.bfloat16(), None, None, beta=1.0, iterations=10)
    assert torch.equal(half, fused_plan(cost.bfloat16().float(), None, None, beta=1.0, iterations=10))
    assert fused_plan(cost[:0], None, None, beta=1.0, iterations=10).shape == (0, 6, 8)


LAUNCH = """
import torch
from sfr.transport.fused import fused_plan

for shape, dtype, iterations in (
    ((2, 16, 16), torch.float32, 10), ((3, 64, 20), torch.bfloat16, 10), ((1, 1, 5), torch.float16, 1)
):
    a, b = (torch.rand(shape[0], size) for size in shape[1:])
    for sides in ((None, None), (a, b)):
        fused_plan(torch.rand(shape).to(dtype), *sides, beta=1.0, iterations=iterations)
print(dict(launches))
"""


def test_the_kernel_starts_on_gpus_that_are_not_there(tmp_path: Any) -> None:
    assert run_for_a_gpu(LAUNCH, tmp_path) == ["{'proximal_kernel': 6}"]


class Launches:
    """Stands in for the kernel's module and notes the launches."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error = error

    def fused_plan(self, cost: Tensor, a: Tensor | None, b: Tensor | None, **options: Any) -> Tensor:
        self.calls.append(options)
        if self.error:
            raise self.error
        return torch.zeros(cost.shape)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors pass for those of a CUDA device where solve() asks for the fused kernel."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    untried = OptionalSolver("triton", dispatch._load_fused, dispatch.fused_solver.failure)
    monkeypatch.setattr(dispatch, "fused_solver", untried)


@pytest.mark.usefixtures("on_a_device")
def test_solve_uses_the_kernel_for_small_problems_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setitem(sys.modules, "sfr.transport.fused", launches)
    assert not solve(costs(2, 64, 64), solver="proximal", iterations=7).any()
    assert not solve(costs(2, 4, 5), masses(2, 4, 1), solver="proximal", iterations=7).any()
    assert launches.calls == [{"beta": 1.0, "iterations": 7}, {"beta": 2.0, "iterations": 7}]


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(
    ("cost", "solver"),
    [(costs(1, 65, 4), "proximal"), (costs(1, 4, 4).double(), "proximal"), (costs(1, 4, 4), "sinkhorn")],
    ids=["large", "float64", "sinkhorn"],
)
def test_other_problems_do_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch, cost: Tensor, solver: Any) -> None:
    launches = Launches()
    monkeypatch.setitem(sys.modules, "sfr.transport.fused", launches)
    assert solve(cost, solver=solver).any()
    assert not launches.calls


@pytest.mark.usefixtures("on_a_device")
def test_a_kernel_that_does_not_start_is_replaced_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(RuntimeError("no compiler"))
    monkeypatch.setitem(sys.modules, "sfr.transport.fused", launches)
    cost = costs(2, 6, 6)
    with pytest.warns(UserWarning, match=r"fused transport kernel does not run here.*no compiler"):
        first = solve(cost, solver="proximal")
    assert torch.equal(solve(cost, solver="proximal"), first)
    assert len(launches.calls) == 1
    assert first.any()


@pytest.mark.usefixtures("on_a_device")
def test_wrong_masses_are_refused_before_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sfr.transport.fused", Launches())
    with pytest.raises(ValueError, match="a must have shape"):
        solve(costs(2, 4, 5), torch.ones(3), solver="proximal")
