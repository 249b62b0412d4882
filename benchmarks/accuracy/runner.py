"""Does it help: sfr, its parts and its peers, trained alike on CIFAR and judged once, at the last epoch.

    python -m benchmarks.accuracy --data-dir DIR --schedule tenth --arms vanilla sfr --seeds 0 1 2
    python -m benchmarks.accuracy --data-dir DIR --plan scan   # what the default configuration was chosen by
    python -m benchmarks.accuracy --data-dir DIR --plan cpu    # all cells behind docs/accuracy.md
    python -m benchmarks.accuracy --data-dir DIR --plan gpu    # ResNet-18, 200 epochs

A cell is one arm, model, data set, seed and schedule, and one JSON file; cells that have theirs are not run again, and
a cell that was killed goes on. Choices are made with `--part held-out`, on 5,000 images taken from the training set;
with `--part test` a network trains on all images and the test set is looked at once. Tables and plots of the cells come
from `python -m benchmarks.accuracy.report`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.accuracy.cell import CELLS, Cell
from benchmarks.accuracy.methods import known_arm
from benchmarks.accuracy.plans import PLANS, SCHEDULES, Round
from benchmarks.accuracy.training import run_cell
from benchmarks.common.data import SOURCES, decoded
from benchmarks.common.paths import CACHE, ROOT
from benchmarks.common.small_sets import SMALL_SOURCES

GPU_WORKERS = 5
# glibc hands big blocks back to the system at once and zeroes them anew; keeping them trains a third faster on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}


def main() -> None:
    """Run the cells that have no file yet."""
    args = parse_arguments()
    if args.cell:
        cell = Cell(**json.loads(args.cell))
        run_cell(cell, SCHEDULES[cell.schedule], args.data_dir, args.results, args.cache, torch.device(args.device))
        return
    cells = list(dict.fromkeys(cell for round_ in rounds(args) for cell in round_.cells()))
    missing = [cell for cell in cells if not (args.results / cell.file).exists()]
    print(f"{len(cells)} cells, {len(missing)} to run, {args.workers} at once", flush=True)
    for dataset in {cell.dataset for cell in missing}:
        decoded(dataset, args.data_dir, args.cache)
    run_all(missing, args)


def rounds(args: argparse.Namespace) -> list[Round]:
    """Return what the command line asks for."""
    if args.plan:
        return PLANS[args.plan]
    return [Round(args.schedule, args.part, args.seeds, args.arms, args.model, args.dataset)]


def run_all(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Run cells in processes of their own, as many at once as there are workers, and say how long it will take."""
    waiting, failed = list(cells), []
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    sizes = {cell: size(cell) for cell in cells}
    done, start = 0, time.perf_counter()
    while waiting or running:
        while waiting and len(running) < args.workers:
            cell = waiting.pop(0)
            running[cell] = start_cell(cell, args)
        time.sleep(0.2)
        for cell in [cell for cell, process in running.items() if process.poll() is not None]:
            if running.pop(cell).returncode:
                failed.append(cell)
            done += sizes[cell]
            left = sum(sizes.values()) - done
            minutes = left / done * (time.perf_counter() - start) / 60
            print(
                f"{described(cell, args.results)} | {len(waiting) + len(running)} left, about {minutes:.0f} min",
                flush=True,
            )
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {', '.join(str(cell.file) for cell in failed)}")


def start_cell(cell: Cell, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    command = [sys.executable, "-m", "benchmarks.accuracy", "--cell", json.dumps(asdict(cell)), "--device", args.device]
    for name in ("data_dir", "results", "cache"):
        if folder := getattr(args, name):
            command += [f"--{name.replace('_', '-')}", str(folder.resolve())]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | KEEP_MEMORY | threads)


def size(cell: Cell) -> int:
    """Return how much there is to train, in images times pixels."""
    schedule = SCHEDULES[cell.schedule]
    images = 50_000 if schedule.per_class is None else SOURCES[cell.dataset].num_classes * schedule.per_class
    return schedule.epochs * images * schedule.image_size**2


def described(cell: Cell, results: Path) -> str:
    file = results / cell.file
    if not file.exists():
        return f"{cell.file}: failed"
    record = json.loads(file.read_text())
    accuracy = record["result"]["accuracy"]
    return f"{cell.file.stem}: {accuracy:.2%} in {record['seconds']:.0f} s, {record['images_per_second']} images/s"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the data set's Parquet files, in place of the Hub")
    add("--plan", choices=PLANS, help="all cells of a comparison, in place of the options that name cells")
    add("--arms", nargs="+", default=["vanilla", "sfr"], type=known_arm, help='as in "sfr@weight=0.2,pairs=last"')
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--schedule", choices=SCHEDULES, default="tenth")
    add("--part", choices=["held-out", "test"], default="test", help="what the last epoch is judged on")
    add("--model", default="resnet20", help="as in examples/train_cifar.py, or of benchmarks/common/networks.py")
    add("--dataset", choices=["cifar100", "cifar10", *SMALL_SOURCES], default="cifar100")
    add("--workers", type=int, help="cells that run at once; default: one a core, on a GPU five")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--results", type=Path, default=CELLS, help="folder of the JSON files")
    add("--cache", type=Path, default=CACHE, help="folder of the decoded images")
    add("--cell", help=argparse.SUPPRESS)  # what a worker is started with
    args = parser.parse_args()
    args.workers = args.workers or (os.cpu_count() or 1 if args.device == "cpu" else GPU_WORKERS)
    return args
