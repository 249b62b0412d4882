"""What a step of SFR communicates and costs as ranks, classes, batch and nodes grow.

    python -m benchmarks.scaling            # about three minutes; prints the tables of docs/scaling.md

Messages are counted, not timed: every collective that the forward and the criterion start is seen on its way through
PyTorch's dispatcher; DDP's own message is the gradients of the parameters. Times are of one process, but for the last
table, whose processes share the cores of one machine and exchange through its memory: it shows what is added, not how
a cluster scales. The model has the stages of a ResNet-20 and next to no work of its own, so that SFR stands out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.common.environment import environment
from benchmarks.common.paths import RESULTS
from benchmarks.common.tables import markdown_table
from benchmarks.scaling.network import CPU, Row
from benchmarks.scaling.ranks import merged, run_ranks
from benchmarks.scaling.terms import feature_cost, label_cost, pixel_cost

RANKS = (1, 2, 4)


def main() -> None:
    """Count and measure, print the tables and write the JSON."""
    args = parse_arguments()
    torch.set_num_threads(1)
    parts: dict[str, list[Row]] = {
        "label term by classes": [label_cost(classes, args.repeats) for classes in (10, 100, 1000, 4000, 10000)],
        "feature term by batch": [feature_cost(batch, 4, args.repeats) for batch in (32, 128, 512)],
        "feature term by nodes": [feature_cost(128, grid, args.repeats) for grid in (2, 4, 8)],
        "label term by pixels": [
            pixel_cost(classes, size, args.repeats) for classes in (21, 150) for size in (64, 128)
        ],
    }
    runs = [run_ranks(ranks, args.repeats) for ranks in RANKS]
    parts["messages of a step"] = [merged(rows) for rows in zip(*(run["messages"] for run in runs), strict=True)]
    parts["step by ranks"] = [run["time"] for run in runs]
    record = {"environment": environment(CPU), "repeats": args.repeats, **parts}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, rows in parts.items():
        print(f"\n**{name[0].upper()}{name[1:]}**\n\n{table(rows)}")
    print(f"\nwrote {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling-cpu.json")
    parser.add_argument("--repeats", type=int, default=25)
    return parser.parse_args()


def table(rows: list[Row]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row.values()] for row in rows]
    return markdown_table(list(rows[0]), cells)


if __name__ == "__main__":
    main()
