"""Does it help: sfr, its parts and its peers, trained alike on CIFAR and judged once, at the last epoch.

    python benchmarks/accuracy.py --data-dir DIR --schedule tenth --arms vanilla sfr --seeds 0 1 2
    python benchmarks/accuracy.py --data-dir DIR --plan scan   # what the default configuration was chosen by
    python benchmarks/accuracy.py --data-dir DIR --plan cpu    # all cells behind docs/accuracy.md
    python benchmarks/accuracy.py --data-dir DIR --plan gpu    # ResNet-18, 200 epochs

A cell is one arm, model, data set, seed and schedule, and one JSON file; cells that have theirs are not run again, and
a cell that was killed goes on. Choices are made with `--part held-out`, on 5,000 images taken from the training set;
with `--part test` a network trains on all images and the test set is looked at once. benchmarks/report.py makes tables
and plots of the cells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from baselines import parse_arm
from cell import Cell, Schedule, run_cell
from images import ROOT, SOURCES, decoded
from report import EARLIER, FEATURES, LADDER, PAST, PEERS, SMOOTHED, comparable
from small_sets import SMALL_SOURCES

RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
CACHE = ROOT / "benchmarks" / ".cache"

SCHEDULES = {
    "smoke": Schedule(epochs=2, batch_size=32, per_class=4, image_size=16),
    "tenth": Schedule(epochs=100, per_class=50),
    "tenth-16px": Schedule(epochs=100, per_class=50, image_size=16),
    "tenth-16px-short": Schedule(epochs=60, per_class=50, image_size=16),
    "noise20-16px": Schedule(epochs=60, per_class=100, image_size=16, label_noise=0.2),
    "noise40-16px": Schedule(epochs=60, per_class=100, image_size=16, label_noise=0.4),
    "full-30": Schedule(epochs=30),
    "full-30-16px": Schedule(epochs=30, image_size=16),
    "full-200": Schedule(epochs=200),
    "few-16px": Schedule(epochs=60, per_class=50, image_size=16, precision="fp32"),
    "full-5-16px": Schedule(epochs=5, image_size=16, precision="fp32"),
    "vit": Schedule(epochs=30, per_class=200, lr=1e-3, weight_decay=0.05, optimizer="adamw", precision="fp32"),
    "fine-tune-20": Schedule(30, 20, lr=0.01, weight_decay=1e-4, image_size=128, per_class=20, precision="fp32"),
    "fine-tune-100": Schedule(10, 20, lr=0.01, weight_decay=1e-4, image_size=128, per_class=100, precision="fp32"),
    "full-200-autoaugment": Schedule(epochs=200, augmentation="autoaugment-cutout"),
}


@dataclass(frozen=True)
class Round:
    """Cells that belong together: some arms and seeds of one schedule."""

    schedule: str
    part: str
    seeds: Sequence[int]
    arms: Sequence[str]
    model: str = "resnet20"
    dataset: str = "cifar100"

    def cells(self) -> list[Cell]:
        """Return the cells seed by seed, so that whatever is there at a kill is paired."""
        return [
            Cell(arm, seed, self.part, self.schedule, self.model, self.dataset)
            for seed in self.seeds
            for arm in self.arms
        ]


MAIN = ("vanilla", "label-smoothing", "ps-kd", "sfr", SMOOTHED, EARLIER, FEATURES, PAST)
SCANNED = (
    "vanilla",
    "label-smoothing",
    "sfr@cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@cost=sqeuclidean,weight=0.2",
    "sfr@weight=0,cost=sqeuclidean,smoothing=class_mean",
    "sfr@weight=0.05,grouping=segments,cost=sqeuclidean,smoothing=class_mean",
    "sfr@grouping=segments,cost=sqeuclidean,weight=0.2",
    "sfr@detach_deep=False,cost=sqeuclidean,weight=0.2",
)
SCANNED_SHORT = (
    *SCANNED,
    "sfr@weight=0.05,cost=sqeuclidean,smoothing=class_mean",
    "sfr@weight=0.05,cost=sqeuclidean",
    "sfr@weight=0.05,grouping=segments,cost=sqeuclidean",
    "sfr@weight=0.005,cost=sqeuclidean",
    "sfr@weight=0.5,cost=sqeuclidean",
    "sfr@weight=1,cost=sqeuclidean",
    "sfr@pairs=last,cost=sqeuclidean,weight=0.2",
    "sfr@weight=0.2",
    "sfr@solver=proximal,cost=sqeuclidean,weight=0.2",
    "sfr@smoothing=uniform,cost=sqeuclidean,weight=0.2",
    "sfr@alpha=0.3,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@grouping=segments,alpha=0.3,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@weight=0,alpha=0.3,cost=sqeuclidean,smoothing=class_mean",
    "sfr@detach_deep=False,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@weight=1,detach_deep=False,cost=sqeuclidean",
)
SCANNED_LABELS = (
    "ps-kd",
    PAST,
    "sfr@smoothing=past,cost=sqeuclidean,weight=0.2",
    "sfr@update=epoch,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@alpha=0,alpha_end=0.8,alpha_steps=3900,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=class,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=onehot,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "cutmix",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2",
    "sfr-cutmix@alpha=0.5,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
SCANNED_ONCE = (
    "sfr@pairs=adjacent,cost=sqeuclidean,weight=0.2",
    "sfr@marginals=cross,cost=sqeuclidean,weight=0.2",
    "sfr@warmup=390,cost=sqeuclidean,weight=0.2",
    "sfr@stages=layer..2.bn2,cost=sqeuclidean,weight=0.2",
    "sfr-slow@decay=0.99,cost=sqeuclidean,weight=0.2",
    "sfr@cost=correlation,weight=0.2",
    "sfr@weight=1,cost=correlation",
    "sfr@smoothing=past,alpha=0.8,cost=sqeuclidean,weight=0.2",
    "sfr@momentum=0.05,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=sample,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr@grouping=crop,cost=sqeuclidean,weight=0.2",
    "tfd@weight=0.2,max_grid=4",
    "tfd@weight=0.2,max_grid=4,grouping=mean",
)
SCANNED_FULL = (
    "vanilla",
    "sfr@cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=class,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-gated@gate=onehot,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
TESTED_VARIANTS = (
    "sfr@update=epoch,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2",
    "sfr-cutmix@alpha=0.5,cost=sqeuclidean,weight=0.2,smoothing=class_mean",
)
# How the default was chosen: what gains nowhere less than vanilla has.
CANDIDATES = ("vanilla", "sfr", SMOOTHED)
REGIMES = [
    Round("fine-tune-20", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "flowers"),
    Round("few-16px", "held-out", range(100, 104), CANDIDATES),
    Round("vit", "held-out", range(100, 104), CANDIDATES, "vit-small-images", "cifar10"),
    Round("full-5-16px", "held-out", range(100, 104), CANDIDATES),
    Round("fine-tune-100", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "flowers"),
    Round("fine-tune-20", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "elpv"),
    Round("fine-tune-100", "held-out", range(100, 104), CANDIDATES, "efficientnet-lite0", "elpv"),
]
# What docs/accuracy.md is made of: the scan by which choices were made, then the test, with seeds of its own.
PLANS = {
    "regimes": REGIMES,
    "scan": [
        Round("tenth-16px-short", "held-out", (100,), SCANNED_SHORT),
        Round("tenth-16px", "held-out", (100, 101), SCANNED),
        Round("tenth-16px", "held-out", (100, 101), SCANNED_LABELS),
        Round("tenth-16px", "held-out", (100,), SCANNED_ONCE),
        Round("full-30-16px", "held-out", (100,), SCANNED_FULL),
        Round("tenth", "held-out", (100, 101), ("vanilla", EARLIER, FEATURES)),
        *REGIMES,
    ],
    "cpu": [
        Round("tenth-16px", "test", range(3), comparable(PEERS, 16)),
        Round("tenth-16px", "test", range(3), tuple(LADDER)),
        Round("tenth-16px", "test", range(3, 5), ("vanilla", "ps-kd", "byot", "sfr", EARLIER, PAST)),
        Round("tenth-16px", "test", range(3), TESTED_VARIANTS),
        Round("noise20-16px", "test", range(3), MAIN),
        Round("noise40-16px", "test", range(3), MAIN),
        Round("full-30-16px", "test", range(3), MAIN),
        Round("noise20-16px", "test", (0,), comparable(PEERS, 16)),
        Round("noise40-16px", "test", (0,), comparable(PEERS, 16)),
        Round("full-30-16px", "test", (0,), comparable(PEERS, 16)),
        Round("tenth", "test", range(3), ("byot", *MAIN)),
    ],
    "gpu": [
        Round("full-200", "test", range(3), MAIN, "resnet18"),
        Round("full-200", "test", range(5), comparable(PEERS, 32), "resnet18"),
        Round("full-200", "test", range(3), tuple(LADDER), "resnet18"),
        Round("full-200-autoaugment", "test", range(3), MAIN, "resnet18"),
        Round("full-200", "test", range(3), MAIN, "wrn_28_10"),
    ],
}
GPU_WORKERS = 4
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
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell)), "--device", args.device]
    command += ["--results", str(args.results), "--cache", str(args.cache)]
    if args.data_dir:
        command += ["--data-dir", str(args.data_dir)]
    return subprocess.Popen(command, env=os.environ | KEEP_MEMORY | threads)


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
    add("--model", default="resnet20", help="as in examples/train_cifar.py, or of benchmarks/networks.py")
    add("--dataset", choices=["cifar100", "cifar10", *SMALL_SOURCES], default="cifar100")
    add("--workers", type=int, help="cells that run at once; default: one a core, on a GPU four")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    add("--cache", type=Path, default=CACHE, help="folder of the decoded images")
    add("--cell", help=argparse.SUPPRESS)  # what a worker is started with
    args = parser.parse_args()
    args.workers = args.workers or (os.cpu_count() or 1 if args.device == "cpu" else GPU_WORKERS)
    return args


def known_arm(spec: str) -> str:
    try:
        parse_arm(spec)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return spec


if __name__ == "__main__":
    main()
