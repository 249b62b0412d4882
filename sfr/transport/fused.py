"""The proximal point method as one Triton kernel: from the cost to the feasible plan in a single launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of every launch, here and elsewhere.
OPTIONS = {"enable_fp_fusion": True}  # the same arithmetic with every Triton: 3.9 warns that its default will change
# As in scaling.py. Triton reads globals of this type only.
TINY = tl.constexpr(1e-30)
UNCHANGED = tl.constexpr(1e-7)  # a problem ends once its cost changes no more than this, relatively, in ten iterations


def fused_plan(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    beta: float,
    iterations: int,
    plan: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Return the plans of :func:`sfr.transport.proximal.proximal_plan`, in one launch.

    One program solves one problem, held in its registers. It also scales costs and masses, rounds the plan onto the
    marginals, and returns the independent coupling for a problem whose cost is not finite. A problem whose cost no
    longer changes ends early.

    Args:
        cost: costs, shape (B, N, M), float16, bfloat16 or float32, N and M at most 64.
        a: float32 masses of any sum, shape (B, N), or None for 1/N.
        b: float32 masses of the same sum, shape (B, M), or None for 1/M.
        beta, iterations: see :func:`sfr.transport.proximal.proximal_plan`.
        plan: takes the plans, contiguous, of the shape of the costs, float32; default a new tensor.
        values: takes the costs under the plans, (B,), contiguous, float32, if they are wanted.

    Returns:
        Plans of shape (B, N, M), float32.
    """
    batch, n, m = cost.shape
    plan = torch.empty((batch, n, m), dtype=torch.float32, device=cost.device) if plan is None else plan
    if batch == 0:
        return plan
    cost = cost.contiguous()
    block_n, block_m = max(16, triton.next_power_of_2(n)), max(16, triton.next_power_of_2(m))
    with torch.cuda.device_of(cost):  # Triton launches on the current device, whatever it is given
        proximal_kernel[(batch,)](
            cost,
            cost if a is None else a.contiguous(),
            cost if b is None else b.contiguous(),
            plan,
            plan if values is None else values,
            n,
            m,
            beta,
            iterations,
            HAS_A=a is not None,
            HAS_B=b is not None,
            HAS_VALUES=values is not None,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            num_warps=max(1, block_n * block_m // 512),  # 16 entries of a matrix per thread: the most without spilling
            **OPTIONS,
        )
    return plan


@triton.jit
def proximal_kernel(  # type: ignore[no-untyped-def]
    cost_ptr,
    a_ptr,
    b_ptr,
    plan_ptr,
    values_ptr,
    n,
    m,
    beta,
    iterations,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Solve problem number `program_id(0)`: costs (N, M), masses (N,) and (M,) if given, plan (N, M) and its cost."""
    problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_M)
    in_rows = i < n
    in_columns = j < m
    inside = in_rows[:, None] & in_columns[None, :]
    offsets = problem * n * m + i[:, None] * m + j[None, :]
    cost = tl.load(cost_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    rows, mass = masses(a_ptr, problem, n, i, in_rows, HAS_A)
    columns, _ = masses(b_ptr, problem, m, j, in_columns, HAS_B)

    strange = tl.where((cost == cost) & (tl.abs(cost) < float("inf")), 0, 1)
    sound = tl.sum(tl.sum(strange, axis=1), axis=0) == 0
    cost = tl.where(sound, cost, 0.0)
    cost = standardised(cost, rows, columns, inside)

    # From zero upwards in each row and column; padding has no mass.
    cost -= tl.where(in_rows, tl.min(tl.where(inside, cost, float("inf")), axis=1), 0.0)[:, None]
    cost -= tl.where(in_columns, tl.min(tl.where(inside, cost, float("inf")), axis=0), 0.0)[None, :]
    kernel = tl.where(inside, tl.exp(-cost / beta), 0.0)
    plan = tl.where(inside, 1.0, 0.0)
    column_scale = columns
    value = float("inf")
    step = 0
    while step < iterations:
        plan = tl.maximum(plan * kernel, TINY)  # padding falls to zero below: it has no mass
        plan *= (rows / tl.maximum(tl.sum(plan * column_scale[None, :], axis=1), TINY))[:, None]
        column_scale = columns / tl.maximum(tl.sum(plan, axis=0), TINY)
        plan *= column_scale[None, :]
        step += 1
        if step % 10 == 0:
            before = value
            # log(kernel) is the cost, up to its unit, without keeping it.
            value = -total(plan * tl.log(tl.maximum(kernel, TINY)))
            step = tl.where(tl.abs(before - value) <= tl.abs(value) * UNCHANGED, iterations, step)
    plan = rounded(plan, rows, columns)
    plan = tl.where(sound, plan, rows[:, None] * columns[None, :])
    tl.store(plan_ptr + offsets, plan * mass, mask=inside)
    if HAS_VALUES:
        cost = tl.load(cost_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(values_ptr + problem, total(plan * mass * cost))


@triton.jit
def total(tile):  # type: ignore[no-untyped-def]
    """Sum all of a tile."""
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def masses(pointer, problem, size, index, valid, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the masses of one side, of sum 1, and the sum they had; without any mass they are uniform."""
    uniform = tl.where(valid, 1.0 / size, 0.0)
    if GIVEN:
        found = tl.load(pointer + problem * size + index, mask=valid, other=0.0)
        mass = tl.sum(found, axis=0)
        return tl.where(mass > 0, found / tl.where(mass > 0, mass, 1.0), uniform), mass
    return uniform, 1.0


@triton.jit
def standardised(cost, rows, columns, inside):  # type: ignore[no-untyped-def]
    """Centre the cost by rows and columns and bring it to standard deviation one."""
    largest = tl.max(tl.max(tl.abs(cost), axis=1), axis=0)
    cost /= tl.where(largest > 0, largest, 1.0)
    cost -= tl.sum(cost * columns[None, :], axis=1)[:, None]
    cost -= tl.sum(cost * rows[:, None], axis=0)[None, :]
    cost = tl.where(inside, cost, 0.0)
    deviation = tl.sqrt(total(cost * cost * rows[:, None] * columns[None, :]))
    largest = tl.max(tl.max(tl.abs(cost), axis=1), axis=0)
    return cost / tl.maximum(tl.maximum(deviation, largest * 1e-3), 1e-6)


@triton.jit
def rounded(plan, rows, columns):  # type: ignore[no-untyped-def]
    """Move a nearly feasible plan onto its marginals; see scaling.round_to_marginals."""
    plan *= tl.minimum(rows / tl.maximum(tl.sum(plan, axis=1), TINY), 1.0)[:, None]
    plan *= tl.minimum(columns / tl.maximum(tl.sum(plan, axis=0), TINY), 1.0)[None, :]
    missing_rows = tl.maximum(rows - tl.sum(plan, axis=1), 0.0)
    missing_columns = tl.maximum(columns - tl.sum(plan, axis=0), 0.0)
    share = missing_columns / tl.maximum(tl.sum(missing_columns, axis=0), TINY)
    return plan + missing_rows[:, None] * share[None, :]
