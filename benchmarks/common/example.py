"""Runs of the examples, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT


def command_of(script: str, arguments: Sequence[str], data_dir: Path | None) -> list[str]:
    """Return the command that runs a script of examples/ from the root, with local data if there are any."""
    source = ["--data-dir", str(data_dir.resolve())] if data_dir else []
    return [sys.executable, f"examples/{script}", *arguments, *source]


def run_example(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command of :func:`command_of` with some variables of the environment set."""
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | environment)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a run has written of its epochs."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
