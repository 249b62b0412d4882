"""What is saved by features that are kept: an epoch of examples/pretrain_kdep.py with `--views 1`, and without.

    python -m benchmarks.pretrain.views --data-dir DIR      # a few minutes; writes JSON and says the ratio

Both ways take turns, each run in a process of its own, and the median of the seconds of an epoch counts. What it takes
to compute the features once, about an epoch, is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.common.environment import environment
from benchmarks.common.example import command_of, history_of, run_example
from benchmarks.common.paths import RESULTS
from examples.common.atomic_file import replace_text

FILE = RESULTS / "kdep-views.json"
WAYS = {"teacher in each epoch": "0", "features kept": "1"}


def main() -> None:
    """Measure, write the JSON and say the ratio."""
    args = parse_arguments()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(args.repeats):
            for way, views in WAYS.items():
                seconds[way].append(epoch(views, Path(name), f"{turn}-{views}", args))
    first, second = (statistics.median(seconds[way]) for way in WAYS)
    record = {
        "options": " ".join(recipe(args)),
        "seconds_of_an_epoch": seconds,
        "ratio": round(first / second, 2),
        "environment": environment(torch.device("cpu")),
    }
    replace_text(args.output, json.dumps(record, indent=1) + "\n")
    print(
        f"an epoch: {first:.1f} s with the teacher, {second:.1f} s with its features kept: {first / second:.1f} times"
    )


def epoch(views: str, folder: Path, name: str, args: argparse.Namespace) -> float:
    """Return the seconds of the second of two epochs of pre-training."""
    where = ["--views", views, "--feature-cache", str(folder / "features"), "--output-dir", str(folder / name)]
    dataset = ["--dataset", "cifar100"] if args.data_dir else []
    command = command_of("pretrain_kdep.py", [*recipe(args), *dataset, *where], args.data_dir)
    run_example(command, {"ACCELERATE_USE_CPU": "true"})
    return float(history_of(folder / name / "pretrain")[-1]["seconds"])


def recipe(args: argparse.Namespace) -> list[str]:
    """Return the options of both ways."""
    return f"--teacher efficientnet-lite0 --student resnet8 --epochs 2 --finetune-epochs 1 --limit {args.limit}".split()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-100's Parquet files; digits without it")
    parser.add_argument("--limit", type=int, default=1280, help="images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=FILE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
