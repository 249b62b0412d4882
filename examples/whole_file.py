"""Files that are there whole or not at all, whenever a run is killed."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write beside `file`, then put the result in its place."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)
