"""Does sfr help a network that gives every pixel a class: a small U-Net and LR-ASPP on CamVid, trained from nothing.

    python -m benchmarks.segmentation --data-dir DIR --models unet
    python -m benchmarks.segmentation --report                 # docs/segmentation.md from the cells that are there

A cell is one arm, network and seed, and one JSON file; cells that have theirs are not run again. It takes one thread:
run several commands with other seeds beside each other. Judged is the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.cells import run_missing
from benchmarks.common.paths import CACHE
from benchmarks.segmentation.cell import PLANS, Cell, run_cell
from benchmarks.segmentation.networks import NETWORKS
from benchmarks.segmentation.page import CELLS, write_page


def main() -> None:
    """Run the cells that have no file yet, and write the page."""
    args = parse_arguments()
    torch.set_num_threads(1)
    models = [] if args.report else args.models
    cells = [
        Cell(args.plan, model, arm, seed, args.part) for model in models for seed in args.seeds for arm in args.arms
    ]
    run = lambda cell: run_cell(cell, args.data_dir, args.results, args.cache)  # noqa: E731
    run_missing(cells, args.results, run, "seconds", "result")
    if args.results == CELLS:
        write_page()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with CamVid's Parquet files, train-*, validation-* and test-*")
    add("--plan", choices=PLANS, default="cpu")
    add("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--arms", nargs="+", default=["vanilla", "sfr", "sfr@gate=none"], help='as in "sfr@feature_weight=1"')
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--part", choices=["validation", "test"], default="test", help="what the last epoch is judged on")
    add("--results", type=Path, default=CELLS, help="folder of the JSON files")
    add("--cache", type=Path, default=CACHE, help="folder of the decoded images")
    add("--report", action="store_true", help="run nothing, write the page")
    args = parser.parse_args()
    if args.data_dir is None and not args.report:
        parser.error("CamVid is read from local Parquet files: pass --data-dir")
    return args


if __name__ == "__main__":
    main()
