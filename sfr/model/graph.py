"""Walks back through the autograd graph: what an output was computed from."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping, Set
from typing import Any

from torch import Tensor


def computed_from(logits: Tensor, own: Set[Any], foreign: Set[Any]) -> bool:
    """Whether the logits were computed from one of a set of nodes and from none of another.

    It is a walk back through the autograd graph that ends at these nodes. Features without a graph (of frozen layers)
    have no node; if none has one, the answer is True.
    """
    if not own:
        return True
    found = False
    for node in graph_behind(logits.grad_fn, own | foreign):
        if node in foreign:
            return False
        found = found or node in own
        if found and not foreign:
            return True
    return found


def graph_behind(node: Any, ends: Container[Any] = ()) -> Iterator[Any]:
    """Yield an autograd node and those it was computed from, each once, the nearest first, and none behind `ends`."""
    waiting, seen = deque([node]), set()
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if node not in ends:
                waiting.extend(parent for parent, _ in node.next_functions)


def on_other_branches(nodes: Mapping[str, Any]) -> frozenset[frozenset[str]]:
    """Return the pairs of names whose later node was not computed from the earlier one; none of a name without a node.

    Args:
        nodes: autograd nodes by name, in the order in which they were made; None of what has no graph.
    """
    apart, seen = set(), [(name, node) for name, node in nodes.items() if node is not None]
    for i, (name, node) in enumerate(seen):
        behind = set(graph_behind(node))
        apart |= {frozenset((name, other)) for other, its in seen[:i] if its not in behind}
    return frozenset(apart)


def names_behind(logits: Tensor, features: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the features that get a gradient from that of the logits, as far as the graph shows.

    An autograd node may have several outputs, as ``torch.compile`` makes one of a whole model: the walk has to arrive
    at the very output that the feature is.
    """
    edges = {name: (each.grad_fn, each.output_nr) for name, each in features.items()}
    missing = {edge for edge in edges.values() if edge[0] is not None}
    waiting: list[Any] = [] if logits.grad_fn is None else [logits.grad_fn]
    seen: set[Any] = {None}
    while waiting and missing:  # through the whole network, in every step: the plainest of loops
        for edge in waiting.pop().next_functions:
            if edge[0] not in seen:
                seen.add(edge[0])
                waiting.append(edge[0])
            missing.discard(edge)
    return [name for name, edge in edges.items() if edge[0] is not None and edge not in missing]
