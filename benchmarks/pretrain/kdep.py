"""KDEP on real images: what a student learns from an ImageNet teacher's features of unlabelled images, by aligner.

    python -m benchmarks.pretrain.kdep --data-dir DIR      # DIR: the Parquet files of CIFAR-10, CIFAR-100 and flowers
    python -m benchmarks.pretrain.kdep --report            # writes docs/kdep.md and its picture from the results

The teacher is EfficientNet-Lite0 with the ImageNet weights of a package (1,280 features, images of 128 pixels).
Students (ResNet-8, 64 features, images of 16 pixels) are pre-trained on 25,000 images of CIFAR-100, each arm for the
same number of steps: without labels, but for the arm "labels". Then they are fine-tuned on a few labelled images of
CIFAR-10, and of the flowers. Within a seed all arms share initial weights, order of the images and labelled images.
Every cell (arm, steps, seed) is one JSON; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.data import both_parts
from benchmarks.common.paired import differences, with_error
from benchmarks.common.paths import DOCS, RESULTS, ROOT
from benchmarks.common.tables import markdown_table, page_with
from benchmarks.pretrain.kdep_cells import ARMS, POWERS, SETTINGS, Unlabelled, run_cell, unlabelled
from examples.common.alignment_plot import plot_alignment
from examples.common.data import load_cifar
from sfr.pretrain.kdep import alignment_of

CELLS = RESULTS / "kdep"
PAGE, PLOT = DOCS / "kdep.md", DOCS / "kdep.png"
CLAIMS = [  # the order that the paper's numbers suggest
    ("svd_pts", "svd"),
    ("svd_pts", "channel_variance"),
    ("svd", "conv1x1"),
    ("channel_variance", "conv1x1"),
    ("conv1x1", "logits"),
    ("logits", "scratch"),
    ("svd_pts", "labels"),
]
MARKER = "<!-- the tables below are made by `python -m benchmarks.pretrain.kdep` -->"


class Results(NamedTuple):
    """Accuracies after pre-training for so many steps and fine-tuning on a data set, by arm and seed."""

    dataset: str
    steps: int
    accuracies: dict[str, dict[int, float]]

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.steps:,} steps"


def main() -> None:
    """Run every cell that has no result yet, then write the page."""
    args = parse_arguments()
    if not args.report:
        torch.set_num_threads(1)
        run_cells(args)
    PAGE.write_text(page(load_results()))
    print(f"wrote {PAGE}")


def run_cells(args: argparse.Namespace) -> None:
    """Run the cells that are missing, all arms of a seed one after the other."""
    wanted = [(arm, 0 if arm == "scratch" else args.steps, seed) for seed in args.seeds for arm in args.arms]
    cells = [cell for cell in wanted if not result_file(*cell).exists()]
    if not cells:
        return
    CELLS.mkdir(parents=True, exist_ok=True)
    images, _ = load_cifar(SETTINGS["pretrain_dataset"], args.data_dir, SETTINGS["pretrain_images"])
    named = "-".join(str(SETTINGS[name]) for name in ("teacher", "teacher_size", "pretrain_dataset", "pretrain_images"))
    given = unlabelled(images, args.work_dir / f"{named}.pt")
    draw(given)
    transfer = {name: both_parts(name, args.data_dir) for name in SETTINGS["labels_per_class"]}
    for arm, steps, seed in cells:
        record = run_cell(arm, steps, seed, given, transfer)
        result_file(arm, steps, seed).write_text(json.dumps(record, indent=1) + "\n")
        reached = ", ".join(f"{name} {value:.1%}" for name, value in record["accuracy"].items())
        print(f"{arm:17} {steps} steps, seed {seed}: {reached}, {record['seconds']:.0f} s", flush=True)


def draw(given: Unlabelled) -> None:
    """Draw the spectrum of the teacher's features, and the spread of the student's targets."""
    features = given.features[0]
    alignment = alignment_of(features.split(5000), 64)
    scalings = [(0.1, power) for power in POWERS.values()]
    plot_alignment(alignment, alignment(features), scalings, PLOT)


def result_file(arm: str, steps: int, seed: int) -> Path:
    return CELLS / f"{arm}-{steps}-seed{seed}.json"


def load_results() -> list[Results]:
    """Return all finished cells, by data set and steps; those from scratch, without a pre-training, are in each."""
    records: list[dict[str, Any]] = [json.loads(file.read_text()) for file in sorted(CELLS.glob("*-seed*.json"))]
    budgets = sorted({record["steps"] for record in records} - {0})
    found = []
    for name in SETTINGS["labels_per_class"]:
        for steps in budgets:
            accuracies: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
            for record in records:
                if record["steps"] in (0, steps):
                    accuracies[record["arm"]][record["seed"]] = record["accuracy"][name]
            found.append(Results(name, steps, {arm: cells for arm, cells in accuracies.items() if cells}))
    return found


def page(results: Sequence[Results]) -> str:
    """Return the page: the words that stand in it, and below the marker both tables anew."""
    titles = [each.title for each in results]
    return page_with(
        PAGE,
        "\n\n".join(
            [
                "Accuracy on the test set in %, mean ± standard error, in brackets the number of seeds:",
                markdown_table(["arm", *titles], [[arm, *(reached(each, arm) for each in results)] for arm in ARMS]),
                "What the paper's numbers suggest, as paired differences in points:",
                markdown_table(
                    ["claimed", *titles], [[f"{a} > {b}", *(gain(r, a, b) for r in results)] for a, b in CLAIMS]
                ),
            ]
        ),
        MARKER,
    )


def reached(results: Results, arm: str) -> str:
    cells = results.accuracies.get(arm, {})
    return f"{with_error([100 * value for value in cells.values()], sign='')} ({len(cells)})" if cells else ""


def gain(results: Results, better: str, worse: str) -> str:
    return with_error(differences(*(results.accuracies.get(arm, {}) for arm in (better, worse))))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the Parquet files of CIFAR-10, CIFAR-100 and flowers")
    add("--work-dir", type=Path, default=ROOT / "runs" / "kdep", help="keeps the teacher's outputs")
    add("--steps", type=int, default=1000, help="of pre-training")
    add("--arms", nargs="+", choices=ARMS, default=ARMS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--report", action="store_true", help="only write the page from the results there are")
    return parser.parse_args()


if __name__ == "__main__":
    main()
