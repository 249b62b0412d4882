"""Which deep stage supervises which shallow one."""

from __future__ import annotations

from collections.abc import Sequence

from sfr.config import Pairs, Stage


def resolve_pairs(pairs: Pairs | Sequence[tuple[Stage, Stage]], names: Sequence[str]) -> list[tuple[int, int]]:
    """Return (shallow, deep) index pairs into `names`, the stages in forward order.

    A depth, a float, is the stage that lies nearest to it: of n stages the first lies at 1 / n, the last at 1.

    Raises:
        ValueError: for an unknown stage, or a pair whose deep stage does not come after the shallow one.
    """
    count = len(names)
    if pairs == "all":
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    if pairs == "last":
        return [(i, count - 1) for i in range(count - 1)]
    if pairs == "adjacent":
        return [(i, i + 1) for i in range(count - 1)]
    resolved = []
    for shallow, deep in pairs:
        i, j = _stage_index(shallow, names), _stage_index(deep, names)
        if i == j and isinstance(shallow, float) and isinstance(deep, float) and shallow < deep:
            raise ValueError(
                f"pairs: the depths {(shallow, deep)!r} are both stage {names[i]!r} of the {count} recorded ones; name "
                "more stages with SFRWrapper(model, stages=...)"
            )
        if i >= j:
            raise ValueError(
                f"pairs: the deep stage must come after the shallow one; got {(shallow, deep)!r}, "
                f"the forward order is {', '.join(names)}"
            )
        resolved.append((i, j))
    return resolved


def _stage_index(stage: Stage, names: Sequence[str]) -> int:
    if isinstance(stage, float):
        return min(range(len(names)), key=lambda i: abs((i + 1) / len(names) - stage))
    if isinstance(stage, str):
        if stage not in names:
            raise ValueError(f"pairs: there is no stage {stage!r}; the stages are {', '.join(names)}")
        return names.index(stage)
    if not -len(names) <= stage < len(names):
        raise ValueError(f"pairs: stage index {stage} is out of range; there are {len(names)} stages")
    return stage % len(names)
