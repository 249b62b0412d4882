"""Atomic file replacement: a file is there whole or not at all, even when the process is killed or the power fails."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write beside `file`, then put the result in its place."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    sync_file(partial)
    os.replace(partial, file)
    sync_folder(file.parent)


def replace_text(file: Path, text: str) -> None:
    """Put a text in the place of the file's."""
    replace_file(file, lambda partial: partial.write_text(text))


def sync_file(file: Path) -> None:
    """Wait until the content of `file` is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in `folder` are on the disk; Windows has no such call."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
