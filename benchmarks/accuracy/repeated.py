"""Cells trained again, by somebody else or elsewhere, beside the recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common.paired import with_error
from benchmarks.common.tables import markdown_table


def repeated(again: Path, recorded: Path) -> str:
    """Return the accuracies of the cells that both folders have, and by how many points they differ."""
    rows, differences = [], []
    for file in sorted(again.glob("*/*.json")):
        name = file.relative_to(again)
        if (recorded / name).exists():
            before, after = accuracy(recorded / name), accuracy(file)
            differences.append(after - before)
            rows.append([str(name.with_suffix("")), f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"])
    if not rows:
        return "None of these cells is recorded."
    rows.append(["mean ± standard error", "", "", with_error(differences)])
    return markdown_table(["cell", "recorded, %", "again, %", "difference"], rows)


def accuracy(file: Path) -> float:
    """Return the accuracy of a cell in %."""
    return 100 * float(json.loads(file.read_text())["result"]["accuracy"])
