"""Tables in Markdown, and the pages whose generated parts they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the lines of a table with one line of heads."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


def page_with(page: Path, generated: str, begin: str, end: str = "") -> str:
    """Return the text of a page whose part between two marks, or from a mark to its end, is written anew.

    The words around are written by hand and stay.

    Raises:
        ValueError: if the page lacks a mark.
    """
    before, found, rest = page.read_text().partition(begin)
    kept = rest.partition(end)[1:] if end else ("", "")
    if not found or kept[0] != end:
        marks = f"the lines {begin!r} and {end!r}, between" if end else f"the line {begin!r}, below"
        raise ValueError(f"{page} must have {marks} which the tables belong")
    return f"{before}{begin}\n\n{generated}\n" + (f"\n{''.join(kept)}" if end else "")
