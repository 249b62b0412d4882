"""Does DoGo help: ResNet-8 and ResNet-20 pre-trained together or alone on CIFAR-10, then judged as frozen encoders.

    python benchmarks/dogo.py --data-dir DIR      # all cells, about half an hour on one core
    python benchmarks/dogo.py --report            # the tables of docs/dogo.md from the cells that are there

A cell is one method and one seed, and one JSON file; a cell that has its file is not run again. Both methods run
examples/pretrain_dogo.py with one recipe: for one seed they share initial weights, order of the images and views, so
that their difference is paired. The result is that of the last epoch.

The encoders are judged on the whole test set by a nearest-neighbour vote and by a linear classifier: with all labels of
the training images, with class-balanced tenths and hundredths of them, and with 40 % of them replaced by a wrong class.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import balanced_indices
from markdown_table import markdown_table
from overhead import environment
from paired import spread
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import pretrain_dogo  # noqa: E402
from frozen_features import knn_accuracy, linear_accuracy  # noqa: E402
from run_folder import replace_text  # noqa: E402

CELLS = ROOT / "benchmarks" / "results" / "dogo"
PAGE = ROOT / "docs" / "dogo.md"
MARK = "<!-- the tables below are made by benchmarks/dogo.py -->\n"
CLASSES = 10
DRAWS = 5  # of the labels, wherever not all are used as they are
RECIPE = {
    "--dataset": "cifar10",
    "--models": "resnet8 resnet20",
    "--limit": "10000",
    "--epochs": "10",
    "--batch-size": "256",
    "--image-size": "16",
    "--lr": "0.001",
}
METHODS = {"alone": "--method alone", "together": "--method dogo"}
MEASURES = {
    "knn": "nearest neighbours",
    "linear": "linear, all labels",
    "tenth": "linear, 10 % of the labels",
    "hundredth": "linear, 1 % of the labels",
    "noisy": "linear, 40 % wrong labels",
}

Scores = dict[str, float]
Cell = dict[str, Any]


def main() -> None:
    """Run the cells that have no file yet, or write the page."""
    args = parse_arguments()
    if not args.report:
        for seed in range(args.seeds):  # seed by seed: whatever is there when a run ends is paired
            for method in METHODS:
                run_cell(method, seed, args.data_dir)
    publish(read_cells())


def run_cell(method: str, seed: int, data_dir: Path) -> None:
    """Pre-train the pair, judge both encoders, write the JSON; nothing if it is there."""
    file = CELLS / f"{method}-seed{seed}.json"
    if file.exists():
        print(f"{file.name} is there")
        return
    options = " ".join(f"{name} {value}" for name, value in RECIPE.items()) + f" {METHODS[method]}"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = ["--data-dir", str(data_dir), "--output-dir", folder]
        trainer = pretrain_dogo.main([*options.split(), "--seed", str(seed), *where])
        history = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    pretraining_seconds = round(time.perf_counter() - start, 1)
    scores = {}
    for model, (_, network) in zip(RECIPE["--models"].split(), trainer.named(), strict=True):
        train, test = (trainer.encode(network, loader) for loader in trainer.loaders)
        scores[model] = judge(*train, *test, seed)
        print(method, seed, model, scores[model], flush=True)
    cell = {
        "method": method,
        "seed": seed,
        "options": options,
        "precision": trainer.accelerator.mixed_precision,
        "pretraining_seconds": pretraining_seconds,
        "environment": environment(trainer.accelerator.device),
        "scores": scores,
        "history": history,
    }
    CELLS.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(cell, indent=1) + "\n")


def judge(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, seed: int) -> Scores:
    """Return the accuracies of one encoder; both methods get the same draws of labels for one seed."""

    def fit(chosen: Tensor, given: Tensor) -> float:
        return linear_accuracy(train[chosen], given[chosen], test, test_labels, CLASSES)

    everything = torch.arange(len(labels))
    scores: dict[str, list[float]] = {name: [] for name in ("tenth", "hundredth", "noisy")}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        scores["tenth"].append(fit(balanced_indices(labels, round(0.1 * len(labels) / CLASSES), generator), labels))
        scores["hundredth"].append(
            fit(balanced_indices(labels, round(0.01 * len(labels) / CLASSES), generator), labels)
        )
        scores["noisy"].append(fit(everything, with_noise(labels, 0.4, generator)))
    return {
        "knn": knn_accuracy(train, labels, test, test_labels),
        "linear": fit(everything, labels),
        **{name: statistics.mean(values) for name, values in scores.items()},
    }


def with_noise(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a random part is replaced by another class, each other class equally likely."""
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, CLASSES, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + shift) % CLASSES, labels)


def read_cells() -> list[Cell]:
    return [json.loads(file.read_text()) for file in sorted(CELLS.glob("*.json"))]


def publish(cells: list[Cell]) -> None:
    """Put the tables below the page's text, which is written by hand."""
    text = PAGE.read_text().split(MARK)[0] if PAGE.exists() else "# DoGo: two networks teach each other\n\n"
    PAGE.write_text(text + MARK + tables(cells))
    print(f"wrote {PAGE}")


def tables(cells: list[Cell]) -> str:
    """Return one table per network, of the seeds that all methods have, and what can be said of it."""
    by_method = {method: {cell["seed"]: cell for cell in cells if cell["method"] == method} for method in METHODS}
    seeds = sorted(set.intersection(*(set(found) for found in by_method.values())))
    if len(seeds) < 2:
        return "\nToo few cells have been run.\n"
    parts = [facts(cells[-1], seeds)]
    for model in RECIPE["--models"].split():
        heads = ["accuracy, %", *METHODS, "difference", "seeds with a gain"]
        rows = []
        for measure, label in MEASURES.items():
            alone, together = (
                [100 * by_method[method][seed]["scores"][model][measure] for seed in seeds] for method in METHODS
            )
            gains = [ours - theirs for ours, theirs in zip(together, alone, strict=True)]
            won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            rows.append([label, spread(alone), spread(together), spread(gains, sign="+"), won])
        parts.append(f"### {model}\n\n{markdown_table(heads, rows)}")
    return "\n" + "\n\n".join(parts) + "\n"


def facts(cell: Cell, seeds: Sequence[int]) -> str:
    recipe = " ".join(cell["options"].split()[:-2])  # all but the method
    return (
        f"Mean ± standard deviation over {len(seeds)} seeds; the difference is paired by seed. Recipe of both methods: "
        f"`pretrain_dogo.py {recipe}`, precision {cell['precision']}."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-10's Parquet files, in place of the Hub")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    args = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision
    return args


if __name__ == "__main__":
    main()
