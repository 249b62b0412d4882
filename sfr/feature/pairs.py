"""Which deep stage supervises which shallow one."""

from __future__ import annotations

from collections.abc import Sequence

from sfr.config import Pairs


def resolve_pairs(pairs: Pairs | Sequence[tuple[int | str, int | str]], names: Sequence[str]) -> list[tuple[int, int]]:
    """Return (shallow, deep) index pairs into `names`, the stages in forward order.

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
        if i >= j:
            raise ValueError(
                f"pairs: the deep stage must come after the shallow one; got {(shallow, deep)!r}, "
                f"the forward order is {', '.join(names)}"
            )
        resolved.append((i, j))
    return resolved


def _stage_index(stage: int | str, names: Sequence[str]) -> int:
    if isinstance(stage, str):
        if stage not in names:
            raise ValueError(f"pairs: there is no stage {stage!r}; the stages are {', '.join(names)}")
        return names.index(stage)
    if not -len(names) <= stage < len(names):
        raise ValueError(f"pairs: stage index {stage} is out of range; there are {len(names)} stages")
    return stage % len(names)
