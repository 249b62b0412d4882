"""EMD-l2: against explicit loops and linprog, its gradient, and what it promises about permutations and types."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

import sfr
from sfr.feature.emd import EMDL2Loss, emd_l2

PROFILE = settings(max_examples=30, deadline=None, database=None, derandomize=True)
SCALE_FREE = ["cosine", "correlation"]
all_costs = pytest.mark.parametrize("cost", ["sqeuclidean", *SCALE_FREE])
both_marginals = pytest.mark.parametrize("marginals", ["uniform", "cross"])


def nodes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def optimal_plan(cost: list[list[float]], a: list[float], b: list[float]) -> np.ndarray:
    """An optimal plan (N, M) by a general linear program solver."""
    n, m = len(a), len(b)
    constraints = []
    for p in range(n):
        constraints.append([1.0 if i == p else 0.0 for i in range(n) for _ in range(m)])
    for q in range(m):
        constraints.append([1.0 if j == q else 0.0 for _ in range(n) for j in range(m)])
    # The last constraint follows from the others.
    solution = linprog(np.ravel(cost), A_eq=np.array(constraints)[:-1], b_eq=[*a, *b][:-1])
    return solution.x.reshape(n, m)


def pair_cost(s: list[float], d: list[float], kind: str) -> float:
    if kind == "sqeuclidean":
        return sum((x - y) ** 2 for x, y in zip(s, d, strict=True)) / len(s)
    if kind == "correlation":
        return 1.0 - statistics.correlation(s, d)
    inner = sum(x * y for x, y in zip(s, d, strict=True))
    return 1.0 - inner / math.sqrt(sum(x * x for x in s)) / math.sqrt(sum(y * y for y in d))


def cross_reference(own: list[list[float]], other: list[list[float]]) -> list[float]:
    """DeepEMD's weights: how much each node agrees with the mean of the other set."""
    weights = []
    for node in own:
        agreement = 0.0
        for c in range(len(node)):
            agreement += node[c] * sum(another[c] for another in other) / len(other)
        weights.append(max(agreement, 0.0) + 1e-3)
    return [weight / sum(weights) for weight in weights]


def mean_square(nodes: list[list[float]]) -> float:
    return statistics.mean(x * x for node in nodes for x in node)


def scales(s: list[list[float]], d: list[list[float]], cost: str) -> tuple[float, float]:
    """What the nodes of each side are divided by."""
    return (1.0, 1.0) if cost == "sqeuclidean" else (math.sqrt(mean_square(s)), math.sqrt(mean_square(d)))


def reference_emd(shallow: Tensor, deep: Tensor, cost: str, marginals: str) -> tuple[float, np.ndarray]:
    """EMD and plan of one image (N, C) against (M, C), with explicit loops."""
    s, d = shallow.tolist(), deep.tolist()
    by = scales(s, d, cost)
    s, d = [[x / by[0] for x in node] for node in s], [[x / by[1] for x in node] for node in d]
    n, m = len(s), len(d)
    ground = [[pair_cost(s[p], d[q], cost) for q in range(m)] for p in range(n)]
    if marginals == "cross":
        a, b = cross_reference(s, d), cross_reference(d, s)
    else:
        a, b = [1.0 / n] * n, [1.0 / m] * m
    plan = optimal_plan(ground, a, b)
    return sum(plan[p, q] * ground[p][q] for p in range(n) for q in range(m)), plan


@all_costs
@both_marginals
@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5), (6, 2), (1, 1)])
def test_value_is_that_of_explicit_loops(cost: Any, marginals: Any, n: int, m: int) -> None:
    shallow, deep = nodes(3, n, 5, seed=1), nodes(3, m, 5, seed=2)
    values = emd_l2(shallow, deep, cost=cost, marginals=marginals, reduction="none")
    expected = [reference_emd(shallow[i], deep[i], cost, marginals)[0] for i in range(3)]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_sinkhorn_value_is_close_to_that_of_explicit_loops() -> None:
    shallow, deep = nodes(3, 6, 16, seed=1), nodes(3, 8, 16, seed=2)
    values = emd_l2(shallow, deep, solver="sinkhorn", reduction="none")
    expected = [reference_emd(shallow[i], deep[i], "sqeuclidean", "uniform")[0] for i in range(3)]
    assert values.tolist() == pytest.approx(expected, rel=0.01)


@PROFILE
@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 10**6))
def test_value_is_at_most_the_mse(n: int, channels: int, seed: int) -> None:
    shallow, deep = nodes(2, n, channels, seed=seed), nodes(2, n, channels, seed=seed + 1)
    assert float(emd_l2(shallow, deep)) <= float(F.mse_loss(shallow, deep)) * (1 + 1e-9)


def test_value_equals_the_mse_where_the_identity_is_optimal() -> None:
    deep = 100.0 * torch.eye(6, dtype=torch.float64)[None].repeat(2, 1, 1)
    shallow = deep + nodes(2, 6, 6)
    assert float(emd_l2(shallow, deep)) == pytest.approx(float(F.mse_loss(shallow, deep)), rel=1e-9)


def test_value_of_one_node_equals_the_mse() -> None:
    shallow, deep = nodes(3, 1, 7, seed=1), nodes(3, 1, 7, seed=2)
    assert float(emd_l2(shallow, deep)) == pytest.approx(float(F.mse_loss(shallow, deep)), rel=1e-12)


@all_costs
@both_marginals
def test_value_of_equal_nodes_is_zero(cost: Any, marginals: Any) -> None:
    same = nodes(2, 5, 4)
    assert float(emd_l2(same, same, cost=cost, marginals=marginals)) == pytest.approx(0.0, abs=1e-12)


@all_costs
@both_marginals
def test_permuting_the_deep_positions_changes_no_value(cost: Any, marginals: Any) -> None:
    shallow, deep = nodes(3, 5, 4, seed=1), nodes(3, 5, 4, seed=2)
    before = emd_l2(shallow, deep, cost=cost, marginals=marginals, reduction="none")
    after = emd_l2(shallow, deep[:, [3, 0, 4, 1, 2]], cost=cost, marginals=marginals, reduction="none")
    torch.testing.assert_close(after, before)


def test_permuting_the_deep_positions_changes_the_mse() -> None:
    shallow, deep = nodes(3, 5, 4, seed=1), nodes(3, 5, 4, seed=2)
    change = F.mse_loss(shallow, deep[:, [3, 0, 4, 1, 2]]) - F.mse_loss(shallow, deep)
    assert abs(float(change)) > 0.01


@all_costs
def test_exchanging_the_sides_changes_no_value(cost: Any) -> None:
    shallow, deep = nodes(3, 5, 4, seed=1), nodes(3, 6, 4, seed=2)
    torch.testing.assert_close(emd_l2(deep, shallow, cost=cost), emd_l2(shallow, deep, cost=cost))


def test_moving_both_sides_far_away_changes_no_float32_value() -> None:
    shallow, deep = nodes(2, 5, 4, seed=1, dtype=torch.float32), nodes(2, 5, 4, seed=2, dtype=torch.float32)
    moved = emd_l2(shallow + 1000.0, deep + 1000.0)
    torch.testing.assert_close(moved, emd_l2(shallow, deep), rtol=1e-3, atol=0)


def test_cosine_value_does_not_depend_on_the_length_of_the_features() -> None:
    shallow, deep = nodes(3, 5, 4, seed=1), nodes(3, 6, 4, seed=2)
    torch.testing.assert_close(emd_l2(9.0 * shallow, 0.1 * deep, cost="cosine"), emd_l2(shallow, deep, cost="cosine"))


def test_correlation_value_depends_neither_on_the_length_nor_on_an_offset_of_the_features() -> None:
    shallow, deep = nodes(3, 5, 4, seed=1), nodes(3, 6, 4, seed=2)
    value = emd_l2(shallow, deep, cost="correlation")
    torch.testing.assert_close(emd_l2(9.0 * shallow + 5.0, 0.1 * deep - 2.0, cost="correlation"), value)


def test_one_channel_has_no_correlation() -> None:
    shallow = nodes(2, 3, 1).requires_grad_()
    value = emd_l2(shallow, nodes(2, 4, 1, seed=1), cost="correlation")
    value.backward()
    assert value.item() == 0
    assert not shallow.grad.any()


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
def test_squared_value_scales_with_the_square_of_the_features(scale: float) -> None:
    shallow, deep = nodes(2, 4, 5, seed=1, dtype=torch.float32), nodes(2, 6, 5, seed=2, dtype=torch.float32)
    expected = scale**2 * float(emd_l2(shallow, deep))
    assert float(emd_l2(scale * shallow, scale * deep)) == pytest.approx(expected, rel=1e-3)


def test_gradient_of_the_shallow_side_is_the_envelope_formula() -> None:
    shallow, deep = nodes(1, 4, 3, seed=1).requires_grad_(), nodes(1, 6, 3, seed=2)
    emd_l2(shallow, deep).backward()
    plan = reference_emd(shallow[0], deep[0], "sqeuclidean", "uniform")[1]
    expected = torch.zeros(1, 4, 3, dtype=torch.float64)
    for p in range(4):
        for q in range(6):
            for c in range(3):
                expected[0, p, c] += 2 / 3 * plan[p, q] * (shallow[0, p, c].item() - deep[0, q, c].item())
    torch.testing.assert_close(shallow.grad, expected)


def test_gradient_of_the_deep_side_is_the_envelope_formula() -> None:
    shallow, deep = nodes(1, 4, 3, seed=1), nodes(1, 6, 3, seed=2).requires_grad_()
    emd_l2(shallow, deep).backward()
    plan = reference_emd(shallow[0], deep[0], "sqeuclidean", "uniform")[1]
    expected = torch.zeros(1, 6, 3, dtype=torch.float64)
    for p in range(4):
        for q in range(6):
            for c in range(3):
                expected[0, q, c] += 2 / 3 * plan[p, q] * (deep[0, q, c].item() - shallow[0, p, c].item())
    torch.testing.assert_close(deep.grad, expected)


@all_costs
@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5)])
def test_gradients_of_both_sides_pass_gradcheck(cost: Any, n: int, m: int) -> None:
    shallow, deep = nodes(2, n, 3, seed=1).requires_grad_(), nodes(2, m, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, d: emd_l2(s, d, cost=cost, reduction="none"), (shallow, deep))


@all_costs
def test_cross_marginals_pass_no_gradient(cost: Any) -> None:
    shallow, deep = nodes(1, 3, 4, seed=1).requires_grad_(), nodes(1, 5, 4, seed=2)
    emd_l2(shallow, deep, cost=cost, marginals="cross").backward()
    plan = torch.from_numpy(reference_emd(shallow[0], deep[0], cost, "cross")[1])
    constant_plan = shallow.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for p in range(3):
        for q in range(5):
            s, d = constant_plan[0, p], deep[0, q]
            if cost == "correlation":
                s, d = s - s.mean(), d - d.mean()
            distance = (s - d).square().mean() if cost == "sqeuclidean" else 1 - (s @ d) / s.norm() / d.norm()
            total = total + plan[p, q] * distance
    total.backward()
    torch.testing.assert_close(shallow.grad, constant_plan.grad)


def test_detached_deep_side_leaves_the_shallow_gradient_alone() -> None:
    shallow, deep = nodes(2, 4, 3, seed=1).requires_grad_(), nodes(2, 4, 3, seed=2).requires_grad_()
    (both,) = torch.autograd.grad(emd_l2(shallow, deep), shallow)
    (alone,) = torch.autograd.grad(emd_l2(shallow, deep.detach()), shallow)
    assert torch.equal(both, alone)


def shared_plan_problem() -> tuple[Tensor, Tensor, np.ndarray, float]:
    """Shallow (N, C), three deep segments (3, M, C), the one plan of their mean cost, and the cost of that plan."""
    shallow, segments = nodes(4, 3, seed=1), nodes(3, 5, 3, seed=2)
    mean_cost = [[0.0] * 5 for _ in range(4)]
    for p in range(4):
        for q in range(5):
            for g in range(3):
                mean_cost[p][q] += pair_cost(shallow[p].tolist(), segments[g, q].tolist(), "sqeuclidean") / 3
    plan = optimal_plan(mean_cost, [1 / 4] * 4, [1 / 5] * 5)
    return shallow, segments, plan, sum(plan[p, q] * mean_cost[p][q] for p in range(4) for q in range(5))


@pytest.mark.parametrize("cost", SCALE_FREE)
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e30])
def test_scale_of_the_features_changes_neither_value_nor_relative_gradient(cost: Any, factor: float) -> None:
    def value_and_gradient(factor: float) -> tuple[Tensor, Tensor]:
        shallow = (nodes(2, 4, 3, dtype=torch.float32) * factor).requires_grad_()
        value = emd_l2(shallow, nodes(2, 4, 3, seed=1, dtype=torch.float32) * factor, cost=cost)
        value.backward()
        return value.detach(), shallow.grad * factor

    torch.testing.assert_close(value_and_gradient(factor), value_and_gradient(1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cost", SCALE_FREE)
def test_nodes_of_zeros_have_a_bounded_gradient(cost: Any) -> None:
    shallow = torch.cat([nodes(1, 3, 4), torch.zeros(1, 3, 4)], dim=1).float().requires_grad_()
    value = emd_l2(shallow, nodes(1, 6, 4, seed=1).float(), cost=cost)
    value.backward()
    assert value.isfinite()
    assert shallow.grad.abs().max() < 1e3
    emd_l2(torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 3, 4), cost=cost).backward()


def test_one_plan_for_all_segments_costs_the_emd_to_their_mean_plus_their_variance() -> None:
    shallow, segments, _, shared = shared_plan_problem()
    variance = 0.0
    for q in range(5):
        for c in range(3):
            mean = sum(segments[g, q, c].item() for g in range(3)) / 3
            variance += sum((segments[g, q, c].item() - mean) ** 2 for g in range(3)) / 3 / (5 * 3)
    to_the_mean = float(emd_l2(shallow[None], segments.mean(dim=0)[None]))
    assert shared == pytest.approx(to_the_mean + variance, rel=1e-9)


def test_one_plan_for_all_segments_has_the_gradient_of_the_emd_to_their_mean() -> None:
    shallow, segments, plan, _ = shared_plan_problem()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for p in range(4):
        for q in range(5):
            for g in range(3):
                expected[p] += 2 / 3 * plan[p, q] * (shallow[p] - segments[g, q]) / 3
    leaf = shallow[None].clone().requires_grad_()
    emd_l2(leaf, segments.mean(dim=0)[None]).backward()
    torch.testing.assert_close(leaf.grad[0], expected)


def test_own_plans_for_the_segments_cost_less_than_one_for_all() -> None:
    shallow, segments, _, shared = shared_plan_problem()
    own = sum(reference_emd(shallow, segment, "sqeuclidean", "uniform")[0] for segment in segments) / 3
    assert float(emd_l2(shallow.expand(3, 4, 3), segments)) == pytest.approx(own, rel=1e-6)
    assert own < shared


@all_costs
@both_marginals
def test_autocast_changes_nothing(cost: Any, marginals: Any) -> None:
    shallow, deep = nodes(2, 4, 8, seed=1, dtype=torch.float32), nodes(2, 5, 8, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = emd_l2(shallow, deep, cost=cost, marginals=marginals)
    assert torch.equal(value, emd_l2(shallow, deep, cost=cost, marginals=marginals))


@pytest.mark.parametrize(
    ("shallow", "deep", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_value_is_float64_for_float64_nodes_and_float32_otherwise(
    shallow: torch.dtype, deep: torch.dtype, expected: torch.dtype
) -> None:
    assert emd_l2(nodes(2, 3, 4).to(shallow), nodes(2, 3, 4).to(deep)).dtype == expected


def test_bfloat16_nodes_give_nearly_the_float32_value() -> None:
    shallow, deep = nodes(4, 6, 32, seed=1, dtype=torch.float32), nodes(4, 6, 32, seed=2, dtype=torch.float32)
    torch.testing.assert_close(emd_l2(shallow.bfloat16(), deep.bfloat16()), emd_l2(shallow, deep), rtol=0.01, atol=0)


def test_gradient_of_bfloat16_nodes_is_bfloat16() -> None:
    shallow = nodes(2, 3, 4).bfloat16().requires_grad_()
    emd_l2(shallow, nodes(2, 3, 4, seed=1).bfloat16()).backward()
    assert shallow.grad is not None
    assert shallow.grad.dtype == torch.bfloat16


@all_costs
def test_gradient_of_equal_nodes_is_finite(cost: Any) -> None:
    shallow = torch.zeros(2, 3, 4, requires_grad=True)
    emd_l2(shallow, torch.zeros(2, 3, 4), cost=cost).backward()
    assert shallow.grad is not None
    assert shallow.grad.isfinite().all()


def test_reduction_none_gives_the_value_of_each_image() -> None:
    shallow, deep = nodes(3, 4, 5, seed=1), nodes(3, 4, 5, seed=2)
    alone = torch.stack([emd_l2(shallow[i : i + 1], deep[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(emd_l2(shallow, deep, reduction="none"), alone)


def test_reduction_mean_is_the_mean_over_images() -> None:
    shallow, deep = nodes(3, 4, 5, seed=1), nodes(3, 4, 5, seed=2)
    assert torch.equal(emd_l2(shallow, deep), emd_l2(shallow, deep, reduction="none").mean())


def test_image_not_finite_leaves_the_values_of_the_others_alone() -> None:
    shallow, deep = nodes(3, 4, 5, seed=1), nodes(3, 4, 5, seed=2)
    expected = emd_l2(shallow, deep, reduction="none")
    shallow[1, 2, 3] = float("nan")
    assert torch.equal(emd_l2(shallow, deep, reduction="none")[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("shallow", "deep"),
    [
        ((2, 3), (2, 3)),
        ((2, 3, 4), (2, 3)),
        ((2, 3, 4, 4), (2, 3, 4, 4)),
        ((2, 3, 4), (3, 3, 4)),
        ((2, 3, 4), (2, 3, 5)),
        ((2, 3, 0), (2, 3, 0)),
        ((2, 3, 4), (2, 0, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_named(shallow: tuple[int, ...], deep: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shallow and deep must be nodes") as caught:
        emd_l2(torch.zeros(shallow), torch.zeros(deep))
    assert f"got {shallow} and {deep}" in str(caught.value)


@pytest.mark.parametrize("nodes", [[[[1.0]]], torch.ones(1, 2, 3, dtype=torch.long), None])
def test_what_are_no_nodes_is_refused_and_named(nodes: Any) -> None:
    with pytest.raises(TypeError, match="deep must be a floating-point tensor of nodes; got"):
        emd_l2(torch.zeros(1, 2, 3), nodes)
    with pytest.raises(TypeError, match="nodes must be a floating-point tensor; got"):
        sfr.channel_segments(nodes, 1)


def test_segments_of_the_wrong_axes_or_of_no_whole_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, N, C\); got \(2, 3\)"):
        sfr.channel_segments(torch.zeros(2, 3), 1)
    with pytest.raises(TypeError, match=r"channels must be an integer; got float 1.5"):
        sfr.channel_segments(torch.zeros(2, 3, 4), 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["cost", "marginals", "solver", "reduction"])
def test_unknown_option_is_refused_and_named(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*; got 'unknown'"):
        emd_l2(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), **{option: "unknown"})


@pytest.mark.parametrize("option", ["cost", "marginals", "solver", "reduction"])
def test_module_refuses_an_unknown_option_at_construction(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*; got 'unknown'"):
        EMDL2Loss(**{option: "unknown"})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cost": "cosine"},
        {"cost": "correlation"},
        {"marginals": "cross"},
        {"solver": "sinkhorn"},
        {"reduction": "none"},
    ],
)
def test_module_gives_what_the_function_gives(options: dict[str, Any]) -> None:
    shallow, deep = nodes(2, 4, 5, seed=1), nodes(2, 6, 5, seed=2)
    assert torch.equal(EMDL2Loss(**options)(shallow, deep), emd_l2(shallow, deep, **options))


def test_module_has_no_parameters_and_no_state() -> None:
    assert not EMDL2Loss().state_dict()
    assert not list(EMDL2Loss().parameters())


def test_the_backward_keeps_the_nodes_and_one_plan_and_no_cost_matrix() -> None:
    shallow, deep = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 7, 4)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        emd_l2(shallow, deep, reduction="none")
    assert sorted(kept) == [(2, 7, 4), (2, 9, 4), (2, 9, 7)]
