"""Transport: exact plans against scipy's linprog, feasibility of both solvers at the edges, and every refusal."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sfr.transport import certified, emd, exact, solve
from sfr.transport.fallback import OptionalSolver
from sfr.transport.scaling import round_to_marginals

SOLVERS = ["exact", "proximal", "sinkhorn"]
both_solvers = pytest.mark.parametrize("solver", SOLVERS)
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
PROFILE = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def optimal_cost(cost: Tensor, a: Tensor, b: Tensor) -> float:
    """The least cost of one problem (N, M), by a general linear program solver."""
    n, m = cost.shape
    constraints, sums = [], []
    for p in range(n):
        row = np.zeros((n, m))
        row[p, :] = 1.0
        constraints.append(row.ravel())
        sums.append(float(a[p]))
    for q in range(m):
        column = np.zeros((n, m))
        column[:, q] = 1.0
        constraints.append(column.ravel())
        sums.append(float(b[q]))
    # The last constraint follows from the others; without it, rounding of the sums cannot make the program infeasible.
    return linprog(cost.double().numpy().ravel(), A_eq=np.array(constraints)[:-1], b_eq=np.array(sums)[:-1]).fun


def random_masses(*shape: int, seed: int = 0) -> Tensor:
    masses = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return masses / masses.sum(dim=-1, keepdim=True)


def random_cost(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def feature_cost(batch: int, n: int, m: int, channels: int) -> Tensor:
    """Squared distances between random local features."""
    generator = torch.Generator().manual_seed(0)
    shallow = torch.randn(batch, n, 1, channels, generator=generator)
    deep = torch.randn(batch, 1, m, channels, generator=generator)
    return (shallow - deep).square().mean(dim=3)


def assert_feasible(plan: Tensor, a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Finite, non-negative, and with the marginals asked for, to `tolerance` of the total mass."""
    assert plan.isfinite().all()
    assert (plan >= 0).all()
    total = float(a.sum(dim=-1).max()) if a.numel() else 0.0
    torch.testing.assert_close(
        plan.sum(dim=-1).double(), a.double().expand(plan.shape[:-1]), rtol=0, atol=tolerance * total
    )
    columns = b.double().expand(*plan.shape[:-2], plan.shape[-1])
    torch.testing.assert_close(plan.sum(dim=-2).double(), columns, rtol=0, atol=tolerance * total)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (8, 8), (4, 7), (7, 4), (1, 6), (6, 1)])
def test_exact_plan_with_uniform_masses_costs_what_linprog_finds(n: int, m: int) -> None:
    costs = random_cost(3, n, m)
    plans = solve(costs, solver="exact")
    for cost, plan in zip(costs, plans, strict=True):
        expected = optimal_cost(cost, torch.full((n,), 1 / n), torch.full((m,), 1 / m))
        assert float((plan * cost).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7), (7, 4), (1, 6)])
def test_exact_plan_with_any_masses_costs_what_linprog_finds(n: int, m: int) -> None:
    costs, a, b = random_cost(3, n, m), random_masses(3, n, seed=1), random_masses(3, m, seed=2)
    plans = solve(costs, a, b, solver="exact")
    for i in range(3):
        assert float((plans[i] * costs[i]).sum()) == pytest.approx(optimal_cost(costs[i], a[i], b[i]), rel=1e-5)


@pytest.mark.parametrize("side", ["a", "b"])
def test_exact_plan_of_a_square_problem_with_masses_on_one_side_costs_what_linprog_finds(side: str) -> None:
    cost, uniform = random_cost(5, 5), torch.full((5,), 0.2, dtype=torch.float64)
    masses = {"a": uniform, "b": uniform, side: random_masses(5, seed=1)}
    plan = solve(cost, **{side: masses[side]}, solver="exact")
    assert float((plan * cost).sum()) == pytest.approx(optimal_cost(cost, **masses), rel=1e-5)


def test_exact_plan_of_negative_costs_costs_what_linprog_finds() -> None:
    cost, a, b = random_cost(4, 6) - 3.0, random_masses(4, seed=1), random_masses(6, seed=2)
    assert float((solve(cost, a, b, "exact") * cost).sum()) == pytest.approx(optimal_cost(cost, a, b), rel=1e-5)


@PROFILE
@given(st.integers(1, 7), st.integers(1, 7), st.integers(-30, 30), st.integers(0, 10**6))
def test_exact_plan_is_optimal_at_every_scale_of_the_cost(n: int, m: int, exponent: int, seed: int) -> None:
    cost, a, b = random_cost(n, m, seed=seed), random_masses(n, seed=seed + 1), random_masses(m, seed=seed + 2)
    plan = solve(cost * 10.0**exponent, a, b, solver="exact")
    assert float((plan * cost).sum()) == pytest.approx(optimal_cost(cost, a, b), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "forbidden"),
    # The simplex is accurate to 1e-9 of the largest cost, as documented; an assignment has no such limit.
    [(5, 5, 1e3), (5, 5, 1e9), (5, 5, 1e20), (4, 6, 1e3), (4, 6, 1e6), (4, 6, 1e9)],
)
def test_exact_plan_is_optimal_beside_one_forbidding_cost(n: int, m: int, forbidden: float) -> None:
    for seed in range(5):
        cost = random_cost(n, m, seed=seed, dtype=torch.float64)
        cost[0, 0] = 100.0  # enough that no optimal plan uses it
        raised = cost.clone()
        raised[0, 0] = forbidden
        expected = optimal_cost(cost, torch.full((n,), 1 / n), torch.full((m,), 1 / m))
        assert float((solve(raised, solver="exact") * cost).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-308, 1e300, 1.7e308])
@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 7)])
def test_exact_plan_of_float64_costs_is_optimal_up_to_the_largest_numbers(
    scale: float, sign: str, n: int, m: int
) -> None:
    cost = random_cost(8, n, m, dtype=torch.float64)
    cost = {"positive": cost, "negative": -cost, "both": 2 * cost - 1}[sign]
    plans = solve(cost * scale, solver="exact")
    uniform = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    for problem, plan in zip(cost, plans, strict=True):
        assert float((plan * problem).sum()) == pytest.approx(optimal_cost(problem, *uniform), rel=1e-6)


def test_exact_plan_is_optimal_beside_costs_that_are_the_largest_numbers() -> None:
    for seed in range(10):
        cost = random_cost(5, 5, seed=seed, dtype=torch.float64)
        cost[0, 0] = cost[3, 2] = 100.0  # enough that no optimal plan uses it
        raised = cost.masked_fill(cost == 100.0, torch.finfo(torch.float64).max)
        assert torch.equal(solve(raised, solver="exact"), solve(cost, solver="exact"))


# How far above the optimum an iterative solver may end on feature costs.
GAPS = {"proximal": 0.002, "sinkhorn": 0.01}
iterative_solvers = pytest.mark.parametrize("solver", GAPS)


@iterative_solvers
@pytest.mark.parametrize(("n", "m", "channels"), [(16, 16, 64), (16, 9, 32), (4, 4, 16), (49, 49, 128)])
def test_iterative_plans_cost_little_more_than_exact_ones(solver: Any, n: int, m: int, channels: int) -> None:
    cost = feature_cost(6, n, m, channels)
    exact = (solve(cost, solver="exact") * cost).sum(dim=(1, 2))
    found = (solve(cost, solver=solver) * cost).sum(dim=(1, 2))
    torch.testing.assert_close(found, exact, rtol=GAPS[solver], atol=0)


@iterative_solvers
def test_iterative_plans_cost_little_more_than_exact_ones_with_uneven_masses(solver: Any) -> None:
    cost, a, b = feature_cost(6, 16, 9, 64), random_masses(6, 16, seed=1), random_masses(6, 9, seed=2)
    exact = (solve(cost, a, b, "exact") * cost).sum(dim=(1, 2))
    found = (solve(cost, a, b, solver) * cost).sum(dim=(1, 2))
    torch.testing.assert_close(found, exact, rtol=GAPS[solver], atol=0)


@iterative_solvers
@pytest.mark.parametrize("exponent", [-41, -38, -30, -10, 10, 30, 37])
def test_an_iterative_plan_does_not_depend_on_the_scale_of_the_cost(solver: Any, exponent: int) -> None:
    cost = feature_cost(2, 6, 6, 8)
    expected = solve(cost, solver=solver)
    torch.testing.assert_close(solve(cost * 10.0**exponent, solver=solver), expected, rtol=0, atol=1e-3)


@iterative_solvers
def test_an_iterative_plan_does_not_depend_on_an_offset_of_the_cost(solver: Any) -> None:
    cost = feature_cost(2, 6, 6, 8).double()
    expected = solve(cost, solver=solver)
    torch.testing.assert_close(solve(cost - 100.0, solver=solver), expected, rtol=0, atol=1e-6)


def test_more_proximal_iterations_tend_to_the_exact_cost() -> None:
    cost = feature_cost(4, 12, 12, 8)
    exact = (solve(cost, solver="exact") * cost).sum()
    gaps = [(solve(cost, solver="proximal", iterations=k) * cost).sum() - exact for k in (10, 100, 1000)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < 1e-4 * exact


def test_smaller_epsilon_gives_a_cheaper_sinkhorn_plan() -> None:
    cost = feature_cost(1, 12, 12, 8)
    blurred, sharp = (solve(cost, solver="sinkhorn", epsilon=epsilon) for epsilon in (1.0, 0.02))
    assert (sharp * cost).sum() < (blurred * cost).sum()


def test_auto_is_exact_on_the_cpu() -> None:
    cost = feature_cost(3, 5, 6, 4)
    assert torch.equal(solve(cost, solver="auto"), solve(cost, solver="exact"))


def degenerate_cost(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    cost = random_cost(*shape, seed=seed)
    if kind == "equal":
        cost = torch.ones(shape)
    elif kind == "zero":
        cost = torch.zeros(shape)
    elif kind == "one huge entry":
        cost[:, 0, 0] = 1e6
    elif kind == "identical rows":
        cost = cost[:, :1].expand(shape)
    elif kind == "negative":
        cost = -cost
    return cost


def degenerate_masses(kind: str, batch: int, size: int, seed: int) -> Tensor | None:
    masses = random_masses(batch, size, seed=seed).float()
    if kind == "uniform":
        return None
    if kind == "zero mass at one node" and size > 1:
        masses[:, 0] = 0.0
    elif kind == "dirac":
        masses = torch.eye(size)[torch.arange(batch) % size]
    return masses / masses.sum(dim=1, keepdim=True)


COSTS = ["random", "equal", "zero", "one huge entry", "identical rows", "negative"]
MASSES = ["uniform", "random", "zero mass at one node", "dirac"]


@both_solvers
@settings(PROFILE, max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(COSTS),
    exponent=st.integers(-30, 30),
    masses=st.tuples(st.sampled_from(MASSES), st.sampled_from(MASSES)),
    seed=st.integers(0, 10**6),
)
def test_plan_is_feasible_for_any_shape_scale_cost_and_masses(
    solver: Any, shape: tuple[int, int, int], kind: str, exponent: int, masses: tuple[str, str], seed: int
) -> None:
    batch, n, m = shape
    a, b = degenerate_masses(masses[0], batch, n, seed + 1), degenerate_masses(masses[1], batch, m, seed + 2)
    plan = solve(degenerate_cost(kind, shape, seed) * 10.0**exponent, a, b, solver)
    assert plan.shape == shape
    assert_feasible(plan, torch.full((n,), 1 / n) if a is None else a, torch.full((m,), 1 / m) if b is None else b)


@both_solvers
@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("masses", MASSES)
def test_plan_of_every_degenerate_cost_is_feasible(solver: Any, kind: str, masses: str) -> None:
    a = degenerate_masses(masses, 2, 4, seed=1)
    plan = solve(degenerate_cost(kind, (2, 4, 6), seed=0), a, None, solver)
    assert_feasible(plan, torch.full((4,), 0.25) if a is None else a, torch.full((6,), 1 / 6))


@both_solvers
def test_marginals_hold_on_a_large_problem(solver: Any) -> None:
    a, b = random_masses(2, 64, seed=1), random_masses(2, 49, seed=2)
    assert_feasible(solve(feature_cost(2, 64, 49, 32), a, b, solver), a, b)


@both_solvers
def test_node_without_mass_sends_nothing(solver: Any) -> None:
    plan = solve(random_cost(3, 4), torch.tensor([0.5, 0.0, 0.5]), None, solver)
    assert torch.equal(plan[1], torch.zeros(4))


@both_solvers
def test_dirac_masses_leave_only_one_plan(solver: Any) -> None:
    plan = solve(random_cost(2, 3), torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.3, 0.5]), solver)
    torch.testing.assert_close(plan, torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))


@both_solvers
def test_problem_without_any_mass_gets_a_zero_plan(solver: Any) -> None:
    assert torch.equal(solve(random_cost(2, 3), torch.zeros(2), torch.zeros(3), solver), torch.zeros(2, 3))


@both_solvers
@pytest.mark.parametrize("masses", [None, torch.full((0, 3), 1 / 3)])
def test_empty_batch_gives_an_empty_plan(solver: Any, masses: Tensor | None) -> None:
    assert solve(torch.zeros(0, 3, 4), masses, None, solver).shape == (0, 3, 4)


@both_solvers
def test_few_iterations_still_give_a_feasible_plan(solver: Any) -> None:
    a, b = random_masses(5, seed=1), random_masses(7, seed=2)
    assert_feasible(solve(random_cost(5, 7), a, b, solver, iterations=1), a, b)


@pytest.mark.parametrize("beta", [0.1, 0.5, 10.0, 1e6])
def test_any_beta_gives_a_feasible_plan(beta: float) -> None:
    a, b = random_masses(5, seed=1), random_masses(7, seed=2)
    assert_feasible(solve(random_cost(5, 7), a, b, "proximal", beta=beta), a, b)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1.0, 1e6])
def test_any_epsilon_gives_a_feasible_plan(epsilon: float) -> None:
    a, b = random_masses(5, seed=1), random_masses(7, seed=2)
    assert_feasible(solve(random_cost(5, 7), a, b, "sinkhorn", epsilon=epsilon), a, b)


@both_solvers
@pytest.mark.parametrize("mass", [1e-32, 1e-20, 1e-6, 7.0, 1e6, 1e30])
def test_plan_scales_with_the_total_mass(solver: Any, mass: float) -> None:
    cost, a, b = random_cost(4, 5), random_masses(4, seed=1).float(), random_masses(5, seed=2).float()
    expected = mass * solve(cost, a, b, solver)
    torch.testing.assert_close(solve(cost, mass * a, mass * b, solver), expected, rtol=1e-3, atol=1e-5 * mass)


@both_solvers
def test_each_problem_of_a_batch_has_its_own_total_mass(solver: Any) -> None:
    totals = torch.tensor([[1.0], [5.0], [0.25]])
    a, b = totals * random_masses(4, seed=1).float(), totals * random_masses(5, seed=2).float()
    plans = solve(random_cost(3, 4, 5), a, b, solver)
    torch.testing.assert_close(plans.sum(dim=(1, 2)), totals.flatten(), rtol=1e-5, atol=0)


def test_rounding_moves_a_wrong_plan_onto_its_marginals() -> None:
    a, b = random_masses(3, 4, seed=1), random_masses(3, 6, seed=2)
    assert_feasible(round_to_marginals(random_cost(3, 4, 6).double(), a, b), a, b, tolerance=1e-12)


def test_rounding_leaves_a_feasible_plan_alone() -> None:
    a, b = random_masses(3, 4, seed=1), random_masses(3, 6, seed=2)
    plan = a[:, :, None] * b[:, None, :]
    torch.testing.assert_close(round_to_marginals(plan, a, b), plan)


@both_solvers
def test_unbatched_problem_gets_the_plan_of_a_batch_of_one(solver: Any) -> None:
    cost, a, b = random_cost(4, 5), random_masses(4, seed=1), random_masses(5, seed=2)
    batched = solve(cost[None], a[None], b[None], solver)
    torch.testing.assert_close(solve(cost, a, b, solver), batched[0], rtol=0, atol=1e-5)


@both_solvers
def test_shared_masses_are_used_for_every_problem(solver: Any) -> None:
    cost, a, b = random_cost(3, 4, 5), random_masses(4, seed=1), random_masses(5, seed=2)
    stated = solve(cost, a.expand(3, 4), b.expand(3, 5), solver)
    torch.testing.assert_close(solve(cost, a, b, solver), stated, rtol=0, atol=1e-5)


@both_solvers
def test_omitted_masses_are_uniform(solver: Any) -> None:
    cost = random_cost(2, 4, 5, dtype=torch.float64)
    stated = solve(cost, torch.full((4,), 0.25), torch.full((5,), 0.2), solver)
    torch.testing.assert_close(solve(cost, solver=solver), stated, rtol=0, atol=1e-6)


@both_solvers
def test_batching_changes_no_plan(solver: Any) -> None:
    cost = feature_cost(5, 4, 6, 8)
    alone = torch.stack([solve(problem, solver=solver) for problem in cost])
    torch.testing.assert_close(solve(cost, solver=solver), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize("m", [4, 6, 8])
def test_number_of_threads_changes_no_exact_plan(monkeypatch: pytest.MonkeyPatch, m: int, threads: int) -> None:
    cost = feature_cost(5, 4, m, 8)
    alone = torch.stack([solve(problem, solver="exact") for problem in cost])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(solve(cost, solver="exact"), alone)


@both_solvers
def test_non_contiguous_cost_gets_the_plan_of_its_contiguous_copy(solver: Any) -> None:
    cost = random_cost(6, 3, 8).permute(1, 0, 2)[:, :, ::2]
    torch.testing.assert_close(solve(cost, solver=solver), solve(cost.contiguous(), solver=solver), rtol=0, atol=1e-5)


@both_solvers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cost_gets_the_plan_of_its_float32_copy(solver: Any, dtype: torch.dtype) -> None:
    cost = random_cost(2, 4, 5).to(dtype)
    assert torch.equal(solve(cost, solver=solver), solve(cost.float(), solver=solver))


@both_solvers
@pytest.mark.parametrize("masses", [None, torch.full((2, 4), 0.25)])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_plan_is_float64_for_a_float64_cost_and_float32_otherwise(
    solver: Any, masses: Tensor | None, dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert solve(random_cost(2, 4, 4).to(dtype), masses, masses, solver).dtype == expected


@both_solvers
def test_float64_plan_has_float64_marginals(solver: Any) -> None:
    a, b = random_masses(4, seed=1), random_masses(5, seed=2)
    assert_feasible(solve(random_cost(4, 5).double(), a, b, solver), a, b, tolerance=1e-12)


@both_solvers
def test_plan_carries_no_graph(solver: Any) -> None:
    cost, a = random_cost(2, 4, 4).requires_grad_(), random_masses(2, 4).float().requires_grad_()
    assert not solve(cost, a, None, solver).requires_grad


@both_solvers
def test_gradient_of_the_transport_cost_is_the_plan(solver: Any) -> None:
    cost = random_cost(2, 4, 5).requires_grad_()
    plan = solve(cost, solver=solver)
    (plan * cost).sum().backward()
    assert torch.equal(cost.grad, plan)


@both_solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solving_changes_neither_cost_nor_masses(solver: Any, dtype: torch.dtype) -> None:
    given_tensors = random_cost(2, 4, 5, dtype=dtype), random_masses(2, 4).to(dtype), random_masses(2, 5).to(dtype)
    copies = [tensor.clone() for tensor in given_tensors]
    solve(*given_tensors, solver)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given_tensors, copies, strict=True))


@both_solvers
def test_autocast_changes_no_plan(solver: Any) -> None:
    cost = feature_cost(2, 6, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plan = solve(cost, solver=solver)
    assert torch.equal(plan, solve(cost, solver=solver))


FINITE_CHECKED_BY = {"the dispatch": (4, 5), "the assignment": (5, 5), "its kin": (8, 4), "its transpose": (4, 8)}


@both_solvers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", FINITE_CHECKED_BY.values(), ids=FINITE_CHECKED_BY)
def test_problem_with_a_cost_not_finite_gets_the_independent_coupling(
    solver: Any, shape: tuple[int, int], value: float
) -> None:
    (n, m), cost = shape, random_cost(3, *shape)
    cost[1, 2, 3] = value
    torch.testing.assert_close(solve(cost, solver=solver)[1], torch.full(shape, 1 / (n * m)))
    a, b = random_masses(n, seed=1).float(), random_masses(m, seed=2).float()
    torch.testing.assert_close(solve(cost, a, b, solver)[1], a[:, None] * b[None, :])


@both_solvers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", FINITE_CHECKED_BY.values(), ids=FINITE_CHECKED_BY)
def test_problem_with_a_cost_not_finite_leaves_the_others_alone(
    solver: Any, shape: tuple[int, int], value: float
) -> None:
    cost = random_cost(3, *shape)
    expected = solve(cost, solver=solver)
    cost[1, 2, 3] = value
    assert torch.equal(solve(cost, solver=solver)[[0, 2]], expected[[0, 2]])


class DeviceReads(TorchDispatchMode):
    """Refuse any operation that brings a tensor of another device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [argument for argument in args if isinstance(argument, Tensor)]
        if isinstance(result, Tensor) and result.device.type == "cpu" and any(s.device.type != "cpu" for s in sources):
            raise RuntimeError(f"{func} copies to the host")
        return result


def fake_cuda_works() -> bool:
    """Older versions of torch ask the driver for a device even for a fake tensor."""
    try:
        with FakeTensorMode(), torch.autocast("cuda", enabled=False):
            torch.rand(1, device="cuda").nonzero()
    except RuntimeError as error:
        return "CUDA error" not in str(error)
    return True


needs_fake_cuda = pytest.mark.skipif(not fake_cuda_works(), reason="this torch has no fake CUDA tensors")


@needs_fake_cuda
@iterative_solvers
@pytest.mark.parametrize("given_masses", [False, True])
def test_an_iterative_solver_never_waits_for_the_device(solver: Any, given_masses: bool) -> None:
    # A fake tensor has a device and no values: whatever needs a value (item, bool, tolist, nonzero, ...) raises.
    with FakeTensorMode(), DeviceReads():
        cost = torch.rand(2, 3, 4, device="cuda")
        a = torch.rand(2, 3, device="cuda") if given_masses else None
        b = torch.rand(2, 4, device="cuda") if given_masses else None
        plan = solve(cost, a, b, solver)
    assert plan.device.type == "cuda"


@needs_fake_cuda
def test_auto_never_waits_for_the_device() -> None:
    with FakeTensorMode(), DeviceReads():
        plan = solve(torch.rand(2, 3, 4, device="cuda"), solver="auto")
    assert plan.device.type == "cuda"


@needs_fake_cuda
@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
    ],
    ids=["item", "bool", "tolist", "nonzero", "cpu", "numpy"],
)
def test_the_check_for_waits_sees_every_kind_of_read(read: Any) -> None:
    with FakeTensorMode(), DeviceReads():
        tensor = torch.rand(2, 3, device="cuda")
        with pytest.raises(Exception, match=r"aten|numpy"):
            read(tensor)


def test_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"solver must be one of 'auto', 'exact', 'proximal', 'sinkhorn'; got 'simplex'"
    ):
        solve(random_cost(2, 2), solver="simplex")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5), (2, 0, 3), (2, 3, 0), (0, 0)])
def test_cost_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cost must have shape \(B, N, M\) or \(N, M\)"):
        solve(torch.zeros(shape))


@pytest.mark.parametrize(
    ("cost", "got"), [(torch.ones(2, 2, dtype=torch.int64), "torch.int64"), ([[0.0, 1.0]], "list")]
)
def test_cost_that_is_no_floating_tensor_is_refused(cost: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"cost must be a floating-point tensor; got {got}"):
        solve(cost)


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 3), (2, 4, 1), ()])
def test_row_masses_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a must have shape \(2, 4\) or \(4,\)"):
        solve(random_cost(2, 4, 5), torch.ones(shape))


@pytest.mark.parametrize("shape", [(4,), (1, 5), (2, 4)])
def test_column_masses_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"b must have shape \(2, 5\) or \(5,\)"):
        solve(random_cost(2, 4, 5), None, torch.ones(shape))


def test_masses_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match="a must be a tensor; got list"):
        solve(random_cost(2, 2), [0.5, 0.5])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["a", "b"])
def test_masses_negative_or_not_finite_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} must hold finite masses >= 0"):
        solve(random_cost(2, 2), **{argument: torch.tensor([1.0, value])})


def test_masses_of_different_sums_are_refused_with_problem_and_both_sums() -> None:
    a, b = torch.tensor([[0.5, 0.5], [1.0, 2.0]]), torch.full((2, 4), 0.25)
    with pytest.raises(ValueError, match=r"a and b must have the same, finite sum; in problem 1 they sum to 3 and 1"):
        solve(random_cost(2, 2, 4), a, b)


@pytest.mark.parametrize("difference", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["a", "b"])
@both_solvers
def test_sums_that_differ_by_more_than_rounding_are_refused(
    solver: Any, side: str, dtype: torch.dtype, difference: float
) -> None:
    masses = {"a": torch.full((4,), 0.25, dtype=dtype), "b": torch.full((5,), 0.2, dtype=dtype)}
    masses[side] = masses[side] * (1 + difference)
    sums = [f"{masses[name].double().sum().item():.6g}" for name in ("a", "b")]
    with pytest.raises(
        ValueError, match=f"a and b must have the same.* in problem 0 they sum to {sums[0]} and {sums[1]}"
    ):
        solve(random_cost(4, 5), **masses, solver=solver)
    with pytest.raises(ValueError, match="a and b must have the same"):
        solve(random_cost(4, 5), **{side: masses[side]}, solver=solver)


def test_sums_of_float64_masses_are_held_to_float64_rounding_for_float64_costs() -> None:
    a, b = random_masses(4, seed=1), random_masses(5, seed=2)
    assert_feasible(solve(random_cost(4, 5).double(), a, b), a, b, tolerance=1e-14)
    with pytest.raises(ValueError, match=r"they sum to 1\S* and 1.00000001"):
        solve(random_cost(4, 5).double(), a, b * (1 + 1e-8))


@both_solvers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [7, 1000])
def test_masses_normalised_in_their_own_precision_are_taken(solver: Any, dtype: torch.dtype, size: int) -> None:
    a = random_masses(2, 3, seed=1).to(dtype)
    b = torch.softmax(random_masses(2, size, seed=2).float(), dim=1).to(dtype)
    plan = solve(random_cost(2, 3, size), a, b, solver, iterations=3)
    scaled = b.double() * (a.double().sum(dim=1) / b.double().sum(dim=1))[:, None]
    assert_feasible(plan, a, scaled)
    torch.testing.assert_close(scaled, b.double(), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)


def test_mass_on_one_side_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"they sum to 0 and 1"):
        solve(random_cost(2, 2), torch.zeros(2), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("total", [1e39, 6e38])
def test_masses_whose_sum_overflows_are_refused(total: float) -> None:
    masses = torch.full((2,), total / 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"masses|sum"):
        solve(random_cost(2, 2), masses, masses, solver="sinkhorn")


def test_masses_that_are_not_real_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a must hold real numbers; got torch\.complex64"):
        solve(random_cost(2, 2), torch.ones(2, dtype=torch.complex64))


def test_whole_numbers_are_masses() -> None:
    plan = solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([3, 1]), torch.tensor([2, 2]))
    assert torch.equal(plan, torch.tensor([[2.0, 1.0], [0.0, 1.0]]))


def test_the_first_wrong_mass_is_named() -> None:
    with pytest.raises(ValueError, match=r"b must hold finite masses >= 0; got nan"):
        solve(random_cost(2, 2), b=torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        solve(random_cost(2, 2), solver="sinkhorn", epsilon=epsilon)


@pytest.mark.parametrize("epsilon", ["small", None, True])
def test_epsilon_that_is_no_number_is_refused(epsilon: Any) -> None:
    with pytest.raises(TypeError, match="epsilon must be a number"):
        solve(random_cost(2, 2), epsilon=epsilon)


@pytest.mark.parametrize("iterations", [0, -3])
def test_iterations_out_of_range_are_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match="iterations"):
        solve(random_cost(2, 2), iterations=iterations)


@pytest.mark.parametrize("iterations", [10.0, None, True])
def test_iterations_that_are_no_integer_are_refused(iterations: Any) -> None:
    with pytest.raises(TypeError, match="iterations must be an integer"):
        solve(random_cost(2, 2), iterations=iterations)


@pytest.mark.parametrize(("masses", "m"), [(None, 40), (None, 10), ("random", 40)])
def test_several_threads_give_the_plans_of_one(masses: str | None, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "COMPILED_THREADED_FROM", 0)
    cost = random_cost(5, 40, m, seed=1)
    a = None if masses is None else random_masses(5, 40, seed=2)
    before = torch.get_num_threads()
    plans = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            plans.append(solve(cost, a, solver="exact"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(plans[0], plans[1])


@needs_numba
@settings(PROFILE, max_examples=40)
@given(st.integers(1, 40), st.sampled_from([*COSTS, "ties"]), st.integers(-30, 30), st.integers(0, 10**6))
def test_the_compiled_assignment_costs_what_scipys_does(size: int, kind: str, exponent: int, seed: int) -> None:
    cost = degenerate_cost(kind, (3, size, size), seed)
    if kind == "ties":
        cost = (3 * cost).floor()
    plan = solve(cost * 10.0**exponent).double()
    for problem, found in zip(cost.double().numpy(), plan.numpy(), strict=True):
        rows, columns = linear_sum_assignment(problem)
        assert sorted(found.argmax(axis=1)) == list(range(size))
        best = problem[rows, columns].mean()
        assert (found * problem).sum() == pytest.approx(best, rel=1e-6, abs=1e-6 * abs(problem).max())


@needs_numba
@settings(PROFILE, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from([*COSTS, "ties"]),
    st.integers(-30, 30),
    st.integers(0, 10**6),
)
def test_the_compiled_plan_of_several_nodes_to_one_costs_what_an_assignment_to_copies_does(
    size: int, times: int, wide: bool, kind: str, exponent: int, seed: int
) -> None:
    cost = degenerate_cost(kind, (2, size * times, size), seed)
    if kind == "ties":
        cost = (3 * cost).floor()
    plans = solve(cost.mT * 10.0**exponent).mT if wide else solve(cost * 10.0**exponent)
    for problem, plan in zip(cost.double(), plans.double(), strict=True):
        assert ((plan > 0).sum(dim=1) == 1).all()
        assert ((plan > 0).sum(dim=0) == times).all()
        copies = problem.repeat_interleave(times, dim=1).numpy()
        best = copies[linear_sum_assignment(copies)].mean()
        assert float((plan * problem).sum()) == pytest.approx(best, rel=1e-6, abs=1e-6 * float(problem.abs().max()))


@needs_numba
@pytest.mark.parametrize("kind", ["features", "near ties", "negative", "tiny", "huge"])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (34, 17), (64, 16), (60, 4)])
def test_the_compiled_plan_of_several_nodes_to_one_is_optimal_by_duality(kind: str, n: int, m: int) -> None:
    from sfr.transport.semi_assignment import assign_groups

    cost = feature_cost(5, n, m, 32)
    if kind == "near ties":
        cost[:, : n - n // 8] = cost[:, :1] * (1 + 1e-3 * random_cost(5, 1, m))
    cost = cost * {"negative": -1.0, "tiny": 1e-35, "huge": 1e35}.get(kind, 1.0)
    plans, prices = torch.zeros(5, n, m), torch.empty(5, m)
    assign_groups(cost.numpy(), plans.numpy(), prices.numpy())
    a, b = (torch.full((5, size), 1 / size, dtype=torch.float64) for size in (n, m))
    primal = cost.double().gather(2, plans.argmax(dim=2, keepdim=True)).mean(dim=(1, 2))
    scale = cost.double().abs().amax(dim=(1, 2))
    assert ((primal - dual_value(cost, a, b, prices)).abs() <= 1e-6 * scale).all()
    assert_feasible(plans, a, b)


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=needs_numba)])
def test_both_assignment_solvers_are_used_and_agree(numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("_assigned", "_scipy_assignment"):
        solver = getattr(exact, name)
        monkeypatch.setattr(
            exact, name, lambda *given, name=name, solver=solver: (called.append(name), solver(*given))[1]
        )
    solver = OptionalSolver("numba", exact._load_assignment, "numba does not work")
    solver.given_up = not numba
    monkeypatch.setattr(exact, "compiled_assignment", solver)
    cost = feature_cost(6, 25, 25, 16)
    plan = solve(cost)
    assert called == ["_assigned" if numba else "_scipy_assignment"]
    expected = [optimal_cost(problem, torch.full((25,), 1 / 25), torch.full((25,), 1 / 25)) for problem in cost]
    torch.testing.assert_close((plan * cost).sum(dim=(1, 2)), torch.tensor(expected), rtol=1e-5, atol=0)


def test_float64_costs_are_assigned_in_float64() -> None:
    cost = torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 3e-12, 1.0 + 1e-12]], dtype=torch.float64)
    assert torch.equal(solve(cost), torch.eye(2, dtype=torch.float64) / 2)
    assert torch.equal(solve(cost.flip(1)), torch.eye(2, dtype=torch.float64).flip(1) / 2)


@both_solvers
def test_emd_gives_the_value_of_the_plan_with_the_gradient_of_the_envelope(solver: Any) -> None:
    cost = feature_cost(3, 5, 6, 4).requires_grad_()
    value, plan = emd(cost, solver=solver)
    assert torch.equal(plan, solve(cost, solver=solver))
    torch.testing.assert_close(value, (plan * cost).sum(dim=(1, 2)))
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    assert torch.equal(gradient, plan)


def test_emd_of_one_problem_is_a_number() -> None:
    value, plan = emd(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert value.shape == ()
    assert value == 0
    assert plan.shape == (2, 2)


def dual_value(cost: Tensor, a: Tensor, b: Tensor, potentials: Tensor) -> Tensor:
    """Value of the dual of the columns' potentials and the best of the rows for them, in float64."""
    cost, potentials = cost.double(), potentials.double()
    best = (cost - potentials[:, None, :]).amin(dim=2)
    return (a * best).sum(dim=1) + (b * potentials).sum(dim=1)


@needs_numba
@pytest.mark.parametrize("kind", ["features", "near ties", "ties", "negative", "tiny", "huge"])
@pytest.mark.parametrize("size", [1, 2, 17, 64])
def test_the_compiled_assignment_is_optimal_by_duality(kind: str, size: int) -> None:
    from sfr.transport.assignment import assign

    cost = feature_cost(5, size, size, 32)
    if kind == "near ties":
        cost[:, : size - size // 8] = cost[:, :1] * (1 + 1e-3 * random_cost(5, 1, size))
    elif kind == "ties":
        cost = (3 * cost).floor()
    cost = cost * {"negative": -1.0, "tiny": 1e-35, "huge": 1e35}.get(kind, 1.0)
    plans, prices = torch.zeros(5, size, size), torch.empty(5, size)
    assign(cost.numpy(), plans.numpy(), prices.numpy())
    uniform = torch.full((5, size), 1 / size, dtype=torch.float64)
    primal = cost.double().gather(2, plans.argmax(dim=2, keepdim=True)).mean(dim=(1, 2))
    scale = cost.double().abs().amax(dim=(1, 2))
    assert ((primal - dual_value(cost, uniform, uniform, prices)).abs() <= 1e-6 * scale).all()


@iterative_solvers
@pytest.mark.parametrize("masses", [False, True])
def test_the_certificate_bounds_the_gap_and_not_by_much_more(solver: Any, masses: bool) -> None:
    cost = 7 * feature_cost(6, 25, 25, 64) + 3
    a, b = (random_masses(6, 25, seed=1).float(), random_masses(6, 25, seed=2).float()) if masses else (None, None)
    plan, bound = certified(cost, a, b, solver)
    assert torch.equal(plan, solve(cost, a, b, solver))
    found = (plan * cost).sum(dim=(1, 2)).double()
    best = (solve(cost.double(), a, b, "exact") * cost).sum(dim=(1, 2))
    gap = 1 - best / found
    assert (bound >= gap - 1e-6).all()
    assert (bound <= (12 if masses else 1.5) * gap + 1e-5).all()


@iterative_solvers
@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (1e-42, 1e-38, 1e-37, 1e36, 3e37)),
        *((torch.float64, scale) for scale in (1e-305, 1e-38, 1e39, 1.7e307)),
    ],
)
def test_the_certificate_holds_at_every_scale(solver: Any, masses: bool, dtype: torch.dtype, scale: float) -> None:
    draws = feature_cost(4, 9, 9, 16)  # below 10
    draws = draws.mul(64).round() / 64  # scaled exactly, also to the smallest numbers of few digits
    cost = (scale * draws.double()).to(dtype)
    a, b = (random_masses(4, 9, seed=1), random_masses(4, 9, seed=2)) if masses else (None, None)
    plan, bound = certified(cost, a, b, solver)
    unit = cost.double() / cost.double().abs().amax()
    found = (plan * unit).sum(dim=(1, 2))
    gap = 1 - (solve(unit, a, b, "exact") * unit).sum(dim=(1, 2)) / found
    assert (bound >= gap - 1e-6).all()
    assert (bound <= (12 if masses else 1.5) * gap + 1e-5).all()


@pytest.mark.parametrize("options", [{"beta": 1e30}, {"beta": 1e300}, {"solver": "sinkhorn", "epsilon": 1e30}])
def test_the_certificate_holds_for_any_option(options: Any) -> None:
    cost = feature_cost(4, 9, 9, 16)
    plan, bound = certified(cost, **options)
    gap = 1 - (solve(cost, solver="exact") * cost).sum(dim=(1, 2)) / (plan * cost).sum(dim=(1, 2))
    assert bound.isfinite().all()
    assert (bound >= gap - 1e-6).all()


def test_the_certificate_counts_what_rounding_hides() -> None:
    cost = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).mul(1e-9)  # beside 1 float32 does not see it
    cost = torch.nn.functional.pad(cost, (0, 1, 0, 1), value=1.0)
    cost[2, 2] = 0.0
    plan, bound = certified(cost, solver="proximal", iterations=1)
    gap = 1 - (solve(cost) * cost).sum() / (plan * cost).sum()
    assert bound >= gap


@iterative_solvers
def test_the_certificate_sees_a_plan_far_from_the_optimum(solver: Any) -> None:
    cost = feature_cost(3, 16, 16, 8)
    early, late = (certified(cost, solver=solver, iterations=k)[1] for k in (2, 200))
    assert (early > 10 * late).all()


def test_the_certificate_of_a_cost_not_finite_is_infinite() -> None:
    cost = random_cost(2, 3, 3)
    cost[1, 0, 0] = float("nan")
    plan, bound = certified(cost)
    assert bound.isfinite().tolist() == [True, False]
    torch.testing.assert_close(plan[1], torch.full((3, 3), 1 / 9))


def test_the_certificate_of_one_problem_is_a_number_and_of_an_exact_plan_refused() -> None:
    assert certified(random_cost(4, 5))[1].shape == ()
    with pytest.raises(ValueError, match="solver must be 'auto', 'proximal' or 'sinkhorn'"):
        certified(random_cost(4, 5), solver="exact")


@needs_fake_cuda
@iterative_solvers
def test_the_certificate_never_waits_for_the_device(solver: Any) -> None:
    with FakeTensorMode(), DeviceReads():
        _, bound = certified(torch.rand(2, 3, 4, device="cuda"), solver=solver)
    assert bound.device.type == "cuda"


@pytest.mark.filterwarnings("ignore:the network simplex did not solve")
def test_a_simplex_out_of_iterations_gives_a_feasible_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = feature_cost(3, 30, 20, 8), random_masses(3, 30, seed=1), random_masses(3, 20, seed=2)
    best = (solve(cost, a, b) * cost).sum()
    monkeypatch.setattr(exact, "SIMPLEX_ITERATIONS", 5)
    plan = solve(cost, a, b)
    assert_feasible(plan, a, b)
    assert (plan * cost).sum() > best


def test_a_simplex_out_of_iterations_warns_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SIMPLEX_ITERATIONS", 5)
    with pytest.warns(UserWarning, match=r"did not solve 3 of 3 problems of shape \(30, 20\) in 5 iterations"):
        solve(feature_cost(3, 30, 20, 8))


def changed_result(*arguments: Any) -> tuple[Any, ...]:
    return np.zeros((2, 2)), 0.0


def failing(*arguments: Any) -> tuple[Any, ...]:
    raise TypeError("takes other arguments now")


@pytest.mark.parametrize("replacement", [None, changed_result, failing], ids=["gone", "another result", "fails"])
def test_without_pots_compiled_simplex_its_public_one_is_used(
    monkeypatch: pytest.MonkeyPatch, replacement: Any
) -> None:
    import ot.lp.emd_wrap

    cost, a, b = feature_cost(3, 6, 4, 8), random_masses(3, 6, seed=1), random_masses(3, 4, seed=2)
    expected = solve(cost, a, b)
    assert exact._simplex_solver().__name__ == "compiled"
    if replacement is None:
        monkeypatch.delattr(ot.lp.emd_wrap, "emd_c")
    else:
        monkeypatch.setattr(ot.lp.emd_wrap, "emd_c", replacement)
    exact._simplex_solver.cache_clear()
    try:
        assert exact._simplex_solver().__name__ == "public"
        monkeypatch.undo()
        torch.testing.assert_close(solve(cost, a, b), expected)
    finally:
        exact._simplex_solver.cache_clear()


def test_no_number_of_a_proximal_plan_falls_below_the_smallest_normal_one() -> None:
    # Arithmetic on such numbers makes a CPU many times slower.
    plan = solve(feature_cost(1, 100, 100, 64), solver="proximal")
    assert not ((plan > 0) & (plan < torch.finfo(torch.float32).tiny)).any()


LAYOUTS = {
    "contiguous": lambda cost: cost,
    "transposed": lambda cost: cost.mT.contiguous().mT,
    "every other": lambda cost: cost.repeat_interleave(2, dim=2)[:, :, ::2],
    "one problem repeated": lambda cost: cost[:1].expand_as(cost),
}


@both_solvers
@settings(PROFILE, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    poison=st.sampled_from([None, float("nan"), float("inf"), float("-inf"), 0.0, -5.0, 6e4]),
    zero_row=st.booleans(),
    graph=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_plan_is_feasible_for_any_dtype_layout_and_bad_entry(
    solver: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    layout: str,
    poison: float | None,
    zero_row: bool,
    graph: bool,
    seed: int,
) -> None:
    batch, n, m = shape
    cost = random_cost(*shape, seed=seed).to(dtype)
    if zero_row:
        cost[:, 0] = 0.0
    if poison is not None:
        cost[seed % batch, seed % n, seed % m] = poison
    cost = LAYOUTS[layout](cost).requires_grad_(graph)
    a, b = random_masses(batch, n, seed=seed + 1), random_masses(m, seed=seed + 2)
    plan = solve(cost, a, b, solver)
    assert plan.shape == shape
    assert_feasible(plan, a, b, tolerance=1e-5)


def solve_what_is_hard(_: int) -> None:
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draws)

    size = 160
    costs = {
        "equal": torch.ones(2, size, size),
        "few values": random(2, size, size).mul(3).floor(),
        "near ties": 1 + 1e-6 * random(2, size, size),
        "product": torch.arange(1.0, size + 1)[:, None] * torch.arange(1.0, size + 1)[None, :] * torch.ones(2, 1, 1),
        "wide range": 10 ** (76 * random(2, size, size) - 38),
        "below normal": 1e-42 * random(2, size, size),
    }
    for name, cost in costs.items():
        for masses in (None, torch.full((size,), 1 / size), random(size).div(size), torch.eye(size)[:2]):
            other = None if masses is None else masses.roll(1, -1)
            for solver in SOLVERS:
                plan = solve(cost, masses, other, solver, iterations=20)
                assert plan.isfinite().all(), (name, solver)
        for plan in (solve(cost[:, :, : size // 4], solver="exact"), solve(cost[:, : size // 4], solver="exact")):
            assert (plan.count_nonzero(dim=(1, 2)) == size).all(), name


def test_no_input_keeps_a_solver_busy_for_ever() -> None:
    run_ranks(solve_what_is_hard, ranks=1)  # in a process of its own, which is ended after minutes; it takes seconds


@pytest.mark.parametrize("solver", SOLVERS)
def test_solve_is_one_operation_inside_torch_compile(solver: Any) -> None:
    cost, a = feature_cost(2, 6, 6, 8), random_masses(6, seed=1).float()
    compiled = torch.compile(lambda cost: 2 * solve(cost, a, None, solver), backend="eager", fullgraph=True)
    assert torch.equal(compiled(cost), 2 * solve(cost, a, None, solver))
