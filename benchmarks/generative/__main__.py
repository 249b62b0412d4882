"""Do deep blocks that supervise shallow ones help a network to draw: a diffusion transformer, by flow matching.

    python -m benchmarks.generative --plan digits              # three seeds of all arms, an hour or two on a CPU
    python -m benchmarks.generative --data-dir DIR             # the same of CIFAR-10 at 16 pixels, six hours
    python -m benchmarks.generative --report                   # docs/generative.md from the cells that are there

A cell is one arm and one seed, and one JSON file; cells that have theirs are not run again, and a cell that was killed
goes on. Every arm runs examples/train_flow.py with one recipe, initial weights, order of the images, noise and times of
its seed, so that differences are paired. Judged is the slow average after the last epoch, on the test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.cells import run_missing
from benchmarks.common.paths import CACHE
from benchmarks.generative.cell import ARMS, PLANS, Cell, run_cell
from benchmarks.generative.page import CELLS, write_page


def main() -> None:
    """Run the cells that have no file yet, and write the page."""
    args = parse_arguments()
    cells = [] if args.report else [Cell(args.plan, arm, seed) for seed in args.seeds for arm in args.arms]
    run = lambda cell: run_cell(cell, args.data_dir, args.results, args.cache)  # noqa: E731
    run_missing(cells, args.results, run, "training_seconds", "scores")
    if args.results == CELLS:
        write_page()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with CIFAR-10's Parquet files, in place of the Hub")
    add("--plan", choices=PLANS, default="cpu")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--results", type=Path, default=CELLS, help="folder of the JSON files")
    add("--cache", type=Path, default=CACHE / "generative", help="folder of the trainings and the decoded images")
    add("--report", action="store_true", help="run nothing, write the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
