"""Cells that run one after the other and have a file each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from examples.common.atomic_file import replace_text

Record = dict[str, Any]


class HasFile(Protocol):
    @property
    def file(self) -> Path:
        """Where the result lies, below the folder of all results."""


Cell = TypeVar("Cell", bound=HasFile)


def run_missing(cells: Iterable[Cell], results: Path, run: Callable[[Cell], Record], seconds: str, found: str) -> None:
    """Run the cells that have no file yet, and say what came out.

    Args:
        cells: seed by seed, so that whatever is there when a run ends is paired.
        results: folder of the JSON files.
        run: runs a cell, writes its file and returns what is in it.
        seconds, found: the entries of the record that tell how long it took, and the scores.
    """
    for cell in cells:
        if (results / cell.file).exists():
            print(f"{cell.file} is there", flush=True)
        else:
            record = run(cell)
            print(f"{cell.file} in {record[seconds]:.0f} s: {record[found]}", flush=True)


def write_record(file: Path, record: Record) -> None:
    """Write the file of a cell, in a folder that is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(record, indent=1) + "\n")
