"""The feature term: the deep maps of a network supervise its shallow ones. Pure functions of maps, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfr.checks import check_choice, check_number
from sfr.config import Cost, Grouping, Marginals, Matching, Pairs, Solver, Stage
from sfr.feature.batched import batched_values
from sfr.feature.channels import match_channels
from sfr.feature.compiled_term import Side, compiled_values, fits
from sfr.feature.emd import emd_l2_of_pairs, in_place_of_pairs, relative_distance
from sfr.feature.nodes import Grid, cells_of, common_grids, to_nodes
from sfr.feature.pairs import resolve_pairs
from sfr.feature.results import NONE, Pair, Terms, pair_name
from sfr.transport.dispatch import FUSED_UP_TO
from sfr.transport.fallback import OptionalSolver


def feature_terms(
    maps: Mapping[str, Tensor],
    *,
    order: Sequence[str] | None = None,
    joining: Collection[str] = (),
    pairs: Pairs | Sequence[tuple[Stage, Stage]] = "all",
    max_grid: int = 4,
    grouping: Grouping = "mean",
    detach_deep: bool = True,
    cost: Cost = "cosine",
    matching: Matching = "transport",
    marginals: Marginals = "uniform",
    solver: Solver = "auto",
    kernels: bool = True,
) -> Terms:
    r"""Return the feature term of every pair of stages, by "shallow <- deep".

    Both maps of a pair are pooled to a common grid, whose cells are the nodes; the deep channels are brought to the
    number of the shallow ones; and the term is the mean over the images of :func:`sfr.emd_l2` between the nodes.

    Args:
        maps: outputs of the stages, channels first, (B, C, *spatial), or (B, C) of vectors, by name, the shallowest
            first.
        joining: names of the maps whose gradient can take that of their nodes along, because the loss has another
            one for them; see :func:`sfr.feature.pooling.pool`.
        order: names of all stages; pairs of a stage that `maps` lacks are left out. Default: the names in `maps`.
        pairs, max_grid, grouping, detach_deep, cost, matching, marginals, solver: see :class:`sfr.SFRConfig`.
        kernels: take all pairs at once, as far as that has the settings: on a device by the Triton kernels
            (``sfr.feature.fused``) or, where they cannot take the maps, as one batch (``sfr.feature.batched``); on the
            CPU by the compiled function (``sfr.feature.compiled_term``).

    Raises:
        ValueError: for an option that there is not, unknown stages, or maps of different batches or of an empty one.

    Example:
        >>> maps = {"layer1": torch.randn(2, 8, 16, 16), "layer2": torch.randn(2, 16, 8, 8)}
        >>> list(feature_terms(maps))
        ['layer1 <- layer2']
    """
    plain = cost == "cosine" and marginals == "uniform" and matching == "transport" and grouping == "mean"
    stated: dict[str, Any] = {"order": order, "pairs": pairs, "max_grid": max_grid}
    if kernels and plain and detach_deep:
        one_by_one = partial(feature_terms, solver=solver, kernels=False, **stated)
        terms = _terms_together(maps, sides_present(maps, **stated), joining, solver, one_by_one)
        if terms is not None:
            return terms
    _check(maps, cost=(cost, Cost), grouping=(grouping, Grouping), marginals=(marginals, Marginals),
           matching=(matching, Matching), solver=(solver, Solver))  # fmt: skip
    given: dict[str, Any] = {"grouping": grouping, "detach_deep": detach_deep, "cost": cost, "matching": matching}
    matched = list(matched_pairs(maps, joining=joining, **stated, **given))
    if not matched:
        return NONE
    nodes = [pair.nodes for pair in matched]
    if matching == "in_place":
        found = in_place_of_pairs(nodes, cost=cost)
    else:
        found = emd_l2_of_pairs(nodes, cost=cost, marginals=marginals, solver=solver)
    finite = torch.stack([pair.finite for pair in matched])
    # An image has one problem, or one for each segment of the channels.
    values = torch.stack([each.reshape(finite.shape[1], -1).mean(dim=1) for each in found])
    distances = None
    if cost == "sqeuclidean":
        distances = torch.stack([relative_distance(x.detach(), *own) for x, own in zip(found, nodes, strict=True)])
    return Terms([pair.name for pair in matched], values * finite, finite, distances)


def _check(maps: Mapping[str, Tensor], **options: tuple[str, Any]) -> None:
    """Raise unless each option is one of its choices, and the maps are of one batch."""
    for name, (value, choices) in options.items():
        check_choice(name, value, choices)
    batches = {name: len(each) for name, each in maps.items()}
    if len(set(batches.values())) > 1 or 0 in batches.values():
        raise ValueError(f"the maps must be of one batch of at least one image; got {batches}")


def _load_fused() -> Callable[..., tuple[Tensor, Tensor]]:
    from sfr.feature.fused import fused_values

    return fused_values


fused_values = OptionalSolver(
    "triton", _load_fused, "the fused feature term does not run here, so PyTorch's operations take its place"
)
FUSED_MAPS = 8  # at most: the pooling kernel has arguments for so many


def _on_a_device(maps: Sequence[Tensor]) -> bool:
    """Whether these are maps of one batch of at most float32, all on one device that is not the CPU."""
    return all(
        type(each) is Tensor
        and not each.is_cpu
        and each.device == maps[0].device
        and each.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and len(each) == len(maps[0])
        and each.numel() > 0
        for each in maps
    )


def _fit_the_kernels(maps: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels can take such maps: they are on an NVIDIA or AMD device."""
    return (
        not fused_values.given_up
        and len(maps) <= FUSED_MAPS
        and all(each.is_cuda and 2 <= each.ndim <= 4 and len(each) < 2**16 and each.numel() < 2**31 for each in maps)
    )


def _terms_together(
    maps: Mapping[str, Tensor],
    sides: Sequence[tuple[Side, Side]],
    joining: Collection[str],
    solver: Solver,
    one_by_one: Callable[[Mapping[str, Tensor]], Terms],
) -> Terms | None:
    """Return the terms of the default configuration, all pairs at once; None if nothing here can take the maps.

    Args:
        maps, joining, solver: see :func:`feature_terms`.
        sides: what :func:`sides_present` returns.
        one_by_one: computes the terms pair by pair, for a gradient that is to be differentiated itself.
    """
    if not sides:
        return NONE
    if _on_a_device(list(maps.values())) and solver in ("auto", "proximal"):
        return _terms_on_a_device(maps, sides, joining, solver, one_by_one)
    found = None
    if solver in ("auto", "exact") and fits(maps, sides):
        found = compiled_values(maps, sides, joining, solver)
    return None if found is None else Terms([pair_name(shallow, deep) for (shallow, _), (deep, _) in sides], *found)


def _terms_on_a_device(
    maps: Mapping[str, Tensor],
    sides: Sequence[tuple[Side, Side]],
    joining: Collection[str],
    solver: Solver,
    one_by_one: Callable[[Mapping[str, Tensor]], Terms],
) -> Terms | None:
    """Return the terms in few launches, by the Triton kernels or else as one batch; None if nodes fit neither."""
    plan = _plan_of(tuple(sides))
    if plan.largest > FUSED_UP_TO:
        return None
    used, found = [maps[name] for name in plan.maps], None
    if _fit_the_kernels(used):

        def otherwise(given: Sequence[Tensor]) -> Tensor:
            return one_by_one(dict(zip(plan.maps, given, strict=True))).by_image[list(plan.order)]

        joined = [i for i, name in enumerate(plan.maps) if name in joining]
        found = fused_values(used, plan.sets, plan.pairs, joined, otherwise)
    if found is None and plan.square:
        found = batched_values([cells_of(used[number], grid) for number, grid in plan.sets], plan.pairs, solver)
    return None if found is None else Terms(plan.names, *found)


class _Plan(NamedTuple):
    """What of the pairs of a step is the same in every step.

    Attributes:
        maps: names of the maps.
        sets: of each set of nodes the number of its map, and its grid.
        pairs: numbers of the shallow and the deep set of each pair, pairs of one size next to each other.
        order: which of the sides each of these pairs is of.
        names: of these pairs.
        largest: nodes of the largest set.
        square: whether the two sides of each pair have as many nodes.
    """

    maps: tuple[str, ...]
    sets: tuple[tuple[int, Grid], ...]
    pairs: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    names: tuple[str, ...]
    largest: int
    square: bool


@lru_cache(maxsize=64)
def _plan_of(sides: tuple[tuple[Side, Side], ...]) -> _Plan:
    sizes = [tuple(math.prod(grid) for _, grid in pair) for pair in sides]
    order = sorted(range(len(sides)), key=sizes.__getitem__)
    maps = tuple(dict.fromkeys(name for pair in sides for name, _ in pair))
    sets = list(dict.fromkeys(side for pair in sides for side in pair))
    ordered = [sides[i] for i in order]
    return _Plan(
        maps,
        tuple((maps.index(name), grid) for name, grid in sets),
        tuple((sets.index(shallow), sets.index(deep)) for shallow, deep in ordered),
        tuple(order),
        tuple(pair_name(shallow, deep) for (shallow, _), (deep, _) in ordered),
        max(map(max, sizes)),
        all(n == m for n, m in sizes),
    )


def sides_present(
    maps: Mapping[str, Tensor],
    order: Sequence[str] | None,
    pairs: Pairs | Sequence[tuple[Stage, Stage]],
    max_grid: int,
    matching: Matching = "transport",
) -> Sequence[tuple[Side, Side]]:
    """Return the two stages of each pair, as far as both are there, with the grids that they are pooled to."""
    names = list(maps) if order is None else order
    named = tuple((names[i], names[j]) for i, j in resolve_pairs(pairs, names))
    return _sides(named, tuple((name, tuple(each.shape[2:])) for name, each in maps.items()), max_grid, matching)


@lru_cache(maxsize=64)
def _sides(
    pairs: tuple[tuple[str, str], ...], shapes: tuple[tuple[str, Grid], ...], max_grid: int, matching: Matching
) -> Sequence[tuple[Side, Side]]:
    """Return what :func:`sides_present` does, of the names of all pairs and the spatial shapes of the maps there."""
    check_number("max_grid", max_grid, 1, whole=True)
    spatial, sides = dict(shapes), []
    for shallow, deep in pairs:
        if shallow in spatial and deep in spatial:
            grids = common_grids(spatial[shallow], spatial[deep], max_grid)
            if matching == "in_place":
                if len(grids[0]) != len(grids[1]):
                    raise ValueError(
                        f"matching='in_place' needs stages with the same axes; {shallow!r} has {len(grids[0])} spatial "
                        f'axes and {deep!r} has {len(grids[1])}: choose other pairs, or matching="transport"'
                    )
                grids = grids[0], grids[0]  # the smaller one
            sides.append(((shallow, grids[0]), (deep, grids[1])))
    return tuple(sides)


def matched_pairs(
    maps: Mapping[str, Tensor],
    *,
    order: Sequence[str] | None,
    joining: Collection[str] = (),
    pairs: Pairs | Sequence[tuple[Stage, Stage]],
    max_grid: int,
    grouping: Grouping,
    detach_deep: bool,
    cost: Cost,
    matching: Matching = "transport",
) -> Iterator[Pair]:
    """Yield both sides of each pair, ready to be matched; for the arguments see :func:`feature_terms`."""
    device = next((maps[name].device for name in reversed(list(maps))), None)  # of a model spread over several
    pooled: dict[tuple[str, Grid], tuple[Tensor, Tensor, Tensor]] = {}

    def nodes_of(name: str, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nodes of a stage, as a shallow and as a deep side, and which of its images are finite."""
        if (name, grid) not in pooled:
            nodes, finite = _finite(to_nodes(maps[name], grid, joining=name in joining).to(device), cost)
            pooled[name, grid] = nodes, nodes.detach() if detach_deep else nodes, finite
        return pooled[name, grid]

    for shallow, deep in sides_present(maps, order, pairs, max_grid, matching):
        own, _, own_finite = nodes_of(*shallow)
        _, other, other_finite = nodes_of(*deep)
        yield Pair(shallow[0], deep[0], match_channels(own, other, grouping), own_finite & other_finite)


def _finite(nodes: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """Zero the nodes of images that hold a value that is not finite; return them and which images are sound.

    With "sqeuclidean" the squares of their differences have to be finite as well.
    """
    values = nodes.detach()
    if cost == "sqeuclidean":
        values = 4 * values.square().sum(dim=2, keepdim=True)
    if values.device.type == "cpu":  # where the host may look: a finite sum has finite terms
        finite = values.sum(dim=(1, 2)).isfinite()
        if finite.all():
            return nodes, finite
    finite = values.isfinite().all(dim=2).all(dim=1)
    return torch.where(finite[:, None, None], nodes, 0.0), finite
