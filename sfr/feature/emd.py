"""EMD-l2: two sets of nodes -> ground cost -> transport plan -> one number per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfr.checks import check_choice, check_floating
from sfr.config import Cost, Marginals, Reduction, Solver
from sfr.feature.compiled import cosine_distances, fits
from sfr.feature.directions import cross_reference, directions, root_mean_square
from sfr.feature.planned import PlannedDistance, squared_cost
from sfr.transport import solve


def emd_l2(
    shallow: Tensor,
    deep: Tensor,
    *,
    cost: Cost = "sqeuclidean",
    marginals: Marginals = "uniform",
    solver: Solver = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return the earth mover's distance between two sets of local features.

    .. math::
        L = \sum_{pq} X^*_{pq} C_{pq}, \qquad C_{pq} = \tfrac1C \lVert s_p - d_q \rVert^2, \qquad
        X^* = \arg\min_{X \in U(a, b)} \langle X, C \rangle

    The plan is held constant in the backward pass, which by the envelope theorem gives the exact gradient. With
    uniform marginals and N = M the value is at most ``F.mse_loss(shallow, deep)``. Gradients flow to both sides:
    detach the deep one to let it supervise.

    Args:
        shallow: nodes, shape (B, N, C), floating.
        deep: nodes, shape (B, M, C), floating.
        cost: "sqeuclidean", the squared l2 distance as a mean over channels (scale of ``F.mse_loss``); "cosine",
            ``1 - cos``, in [0, 2]; or "correlation", the cosine of nodes centred over their channels, which ignores
            their scale and a common offset of the channels (as after a ReLU). Both are computed as half the squared
            distance of nodes of unit length; a node shorter than a thousandth of the root mean square length stays
            shorter than 1 and so counts less.
        marginals: "uniform" or "cross", DeepEMD's cross-reference weights ``relu(<s_p, mean_q d_q>) + 1e-3``,
            normalised, without gradient.
        solver: see :func:`sfr.transport.solve`.
        reduction: "mean" over the batch or "none".

    Returns:
        A 0-d tensor, or shape (B,) for ``reduction="none"``; float32 (float64 for float64 nodes).

    Raises:
        TypeError: for nodes that are no floating-point tensor.
        ValueError: for shapes that do not fit, or an unknown option.

    Reference:
        The EMD-l2 loss of Fan & Hou, arXiv 2103.07350 (abstract; the formula is our reading), with the ground cost of
        Zhang et al., DeepEMD, CVPR 2020.

    Example:
        >>> nodes = torch.eye(4).unsqueeze(0)
        >>> float(emd_l2(nodes, nodes.flip(1)))  # a permutation of the positions costs nothing
        0.0
    """
    check_choice("cost", cost, Cost)
    check_choice("marginals", marginals, Marginals)
    check_choice("reduction", reduction, Reduction)
    _check_nodes(shallow, deep)
    [value] = emd_l2_of_pairs([(shallow, deep)], cost=cost, marginals=marginals, solver=solver)
    return value.mean() if reduction == "mean" else value


def _check_nodes(shallow: Tensor, deep: Tensor) -> None:
    check_floating("shallow", shallow, " of nodes")
    check_floating("deep", deep, " of nodes")
    if (
        shallow.ndim != 3
        or deep.ndim != 3
        or shallow.shape[::2] != deep.shape[::2]
        or 0 in (*shallow.shape[1:], deep.shape[1])
    ):
        raise ValueError(
            "shallow and deep must be nodes of shape (B, N, C) and (B, M, C) with equal B and C, and N, M and C of at "
            f"least 1; got {tuple(shallow.shape)} and {tuple(deep.shape)}"
        )


def emd_l2_of_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], *, cost: Cost, marginals: Marginals, solver: Solver
) -> list[Tensor]:
    """Return :func:`emd_l2` of several pairs of nodes, each (B,), with one call of the solver for all of one size.

    The nodes of a tensor that is in several pairs are brought to their directions once.
    """
    if not pairs:
        return []
    if cost == "cosine" and marginals == "uniform" and solver in ("auto", "exact"):
        found = _compiled(pairs, solver)
        if found is not None:
            return found
    return _planned(pairs, cost, marginals, solver)


def _compiled(pairs: Sequence[tuple[Tensor, Tensor]], solver: Solver) -> list[Tensor] | None:
    """Return the distances by the compiled function, if it takes all pairs and works here."""

    def otherwise(nodes: Sequence[Tensor]) -> Tensor:
        return _planned([(nodes[0], nodes[1])], "cosine", "uniform", solver)[0][None]

    if not all(fits(*pair) for pair in pairs):
        return None
    found: list[Tensor] = []
    for pair in pairs:
        result = cosine_distances(pair, [(0, 1)], otherwise)
        if result is None:
            return None
        values, finite = (each[0] for each in result)
        found.append(values if finite.all() else values * torch.where(finite, 1.0, math.nan))
    return found


def _planned(pairs: Sequence[tuple[Tensor, Tensor]], cost: Cost, marginals: Marginals, solver: Solver) -> list[Tensor]:
    """Return the distances by a solver's plans, one call of it for all of one size."""
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        sides = _comparable(pairs, cost, marginals)
        costs = [squared_cost(side.shallow.detach(), side.deep.detach()) for side in sides]
        plans = _solve_together(costs, sides, solver)
        values: list[Tensor] = [
            PlannedDistance.apply(side.shallow, side.deep, each, plan, side.a is None)
            for side, each, plan in zip(sides, costs, plans, strict=True)
        ]
        if cost == "sqeuclidean":
            return values
        # Half the squared distance of unit vectors is 1 - cos.
        return [value * (side.shallow.shape[2] / 2) for side, value in zip(sides, values, strict=True)]


def in_place_of_pairs(pairs: Sequence[tuple[Tensor, Tensor]], *, cost: Cost) -> list[Tensor]:
    """Return the mean ground cost of the nodes at the same place, of one or more pairs (B, N, C) each, each (B,)."""
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        values = []
        for side in _comparable(pairs, cost, "uniform"):
            value = (side.shallow - side.deep).square().mean(dim=(1, 2))
            values.append(value if cost == "sqeuclidean" else value * (side.shallow.shape[2] / 2))
        return values


def in_place_plan(nodes: Tensor) -> Tensor:
    """Return the plan that matches each of the nodes (B, N, C) with the one at its place, (B, N, N)."""
    batch, count, _ = nodes.shape
    return torch.eye(count, device=nodes.device).div_(count).expand(batch, -1, -1)


@torch.no_grad()
def transport_plan(
    shallow: Tensor,
    deep: Tensor,
    *,
    cost: Cost = "sqeuclidean",
    marginals: Marginals = "uniform",
    solver: Solver = "auto",
) -> Tensor:
    """Return the transport plan that :func:`emd_l2` uses for the same arguments.

    Args:
        shallow: nodes, shape (B, N, C), floating.
        deep: nodes, shape (B, M, C), floating.
        cost, marginals, solver: see :func:`emd_l2`.

    Returns:
        Plans of shape (B, N, M): the mass of node p of the shallow side that is matched with node q of the deep side.
        Each plan sums to 1.

    Example:
        >>> nodes = torch.eye(3).unsqueeze(0)
        >>> transport_plan(nodes, nodes.roll(1, dims=1)).argmax(dim=2)
        tensor([[1, 2, 0]])
    """
    _check_nodes(shallow, deep)
    with torch.autocast(shallow.device.type, enabled=False):
        [side] = _comparable([(shallow, deep)], cost, marginals)
        return solve(squared_cost(side.shallow, side.deep), side.a, side.b, solver)


class _Sides(NamedTuple):
    """Nodes (B, N, C) and (B, M, C) whose squared distance is the ground cost, up to its unit, and their masses."""

    shallow: Tensor
    deep: Tensor
    a: Tensor | None
    b: Tensor | None


def _comparable(pairs: Sequence[tuple[Tensor, Tensor]], cost: Cost, marginals: Marginals) -> list[_Sides]:
    found: dict[tuple[int, torch.dtype], Tensor] = {}

    def brought(nodes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return nodes as the cost takes them, by which tensor they are: it lives as long as the pairs do."""
        if (id(nodes), dtype) not in found:
            own = nodes.to(dtype)
            own = own if cost == "sqeuclidean" else directions(own, centred=cost == "correlation")
            found[id(nodes), dtype] = own
        return found[id(nodes), dtype]

    sides = []
    for shallow, deep in pairs:
        dtype = torch.promote_types(torch.promote_types(shallow.dtype, deep.dtype), torch.float32)
        a, b = None, None
        if marginals == "cross":
            a, b = cross_reference(shallow.to(dtype), deep.to(dtype), scaled=cost != "sqeuclidean")
        sides.append(_Sides(brought(shallow, dtype), brought(deep, dtype), a, b))
    return sides


@torch.no_grad()
def _solve_together(costs: Sequence[Tensor], sides: Sequence[_Sides], solver: Solver) -> list[Tensor]:
    """Return the plans of batches of costs; those of one size are solved as one batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault((cost.shape[1:], cost.dtype), []).append(i)
    plans: dict[int, Tensor] = {}
    for group in groups.values():
        cost = _joined([costs[i] for i in group])
        a, b = (_joined([sides[i][side] for i in group]) for side in (2, 3))
        solved = solve(cost, a, b, solver).split([len(costs[i]) for i in group])
        plans |= zip(group, solved, strict=True)
    return [plans[i] for i in range(len(costs))]


def _joined(batches: list[Any]) -> Any:
    """Return the batches as one; None for masses that are all uniform."""
    return batches[0] if len(batches) == 1 or batches[0] is None else torch.cat(batches)


@torch.no_grad()
def relative_distance(values: Tensor, shallow: Tensor, deep: Tensor) -> Tensor:
    """Return the mean over problems of squared distances (B,) over the sum of the mean squares of the nodes, 0-d."""
    scale = torch.hypot(root_mean_square(shallow), root_mean_square(deep)).flatten()
    return (values.sqrt() / scale).square().mean()


class EMDL2Loss(nn.Module):
    """:func:`emd_l2` as a module, for use on any two sets of nodes without a wrapper.

    Args:
        cost, marginals, solver, reduction: see :func:`emd_l2`.

    Example:
        >>> loss = EMDL2Loss(cost="cosine")
        >>> loss(torch.rand(2, 16, 8), torch.rand(2, 9, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        cost: Cost = "sqeuclidean",
        marginals: Marginals = "uniform",
        solver: Solver = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("cost", cost, Cost)
        check_choice("marginals", marginals, Marginals)
        check_choice("solver", solver, Solver)
        check_choice("reduction", reduction, Reduction)
        self.cost, self.marginals, self.solver, self.reduction = cost, marginals, solver, reduction

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return the loss of nodes (B, N, C) against nodes (B, M, C)."""
        return emd_l2(
            shallow,
            deep,
            cost=self.cost,
            marginals=self.marginals,
            solver=self.solver,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"cost={self.cost}, marginals={self.marginals}, solver={self.solver}"
