"""Does DoGo help: ResNet-8 and ResNet-20 pre-trained together or alone on CIFAR-10, then judged as frozen encoders.

    python -m benchmarks.pretrain.dogo --data-dir DIR      # all cells, about half an hour on one core
    python -m benchmarks.pretrain.dogo --report            # the tables of docs/dogo.md from the cells that are there

A cell is one method and one seed, and one JSON file; a cell that has its file is not run again. Both methods run
examples/pretrain_dogo.py with one recipe: for one seed they share initial weights, order of the images and views, so
that their difference is paired. The result is that of the last epoch.

The encoders are judged on the whole test set by a nearest-neighbour vote and by a linear classifier: with all labels of
the training images, with class-balanced tenths and hundredths of them, and with 40 % of them replaced by a wrong class.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.environment import environment
from benchmarks.common.example import command_of, history_of, run_example
from benchmarks.common.labels import few_labels, with_noise
from benchmarks.common.paired import spread
from benchmarks.common.paths import DOCS, RESULTS
from benchmarks.common.tables import markdown_table, page_with
from examples.common.atomic_file import replace_text
from examples.common.data import SOURCES, Labelled, Splits, load_splits
from examples.common.frozen_features import knn_accuracy, linear_accuracy
from examples.common.models import build_model
from examples.common.two_views import plain_view
from sfr.pretrain import TwoViewNetwork

CELLS = RESULTS / "dogo"
PAGE = DOCS / "dogo.md"
MARK = "<!-- the tables below are made by `python -m benchmarks.pretrain.dogo` -->"
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
        CELLS.mkdir(parents=True, exist_ok=True)
        splits = load_splits(RECIPE["--dataset"], args.data_dir, int(RECIPE["--limit"]))
        for seed in range(args.seeds):  # seed by seed: whatever is there when a run ends is paired
            for method in METHODS:
                file = CELLS / f"{method}-seed{seed}.json"
                if file.exists():
                    print(f"{file.name} is there")
                else:
                    cell = run_cell(method, seed, splits, args)
                    replace_text(file, json.dumps(cell, indent=1) + "\n")
    PAGE.write_text(page_with(PAGE, tables(read_cells()), MARK))
    print(f"wrote {PAGE}")


def run_cell(method: str, seed: int, splits: Splits, args: argparse.Namespace) -> Cell:
    """Pre-train the pair by the example's command and judge both encoders."""
    options = " ".join(f"{name} {value}" for name, value in RECIPE.items()) + f" {METHODS[method]}"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrain([*options.split(), "--seed", str(seed), "--output-dir", str(folder / "run")], args)
        history = history_of(folder / "run")
        weights = torch.load(folder / "run" / "model.pt", weights_only=True)
    seconds = round(time.perf_counter() - start, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = {}
    for name, model in encoders(weights).items():
        train, test = (encoded(model.to(device), part.data, args.precision) for part in (splits.train, splits.test))
        scores[name] = judge(train, splits.train.data.labels, test, splits.test.data.labels, seed)
        print(method, seed, name, scores[name], flush=True)
    return {
        "method": method,
        "seed": seed,
        "options": options,
        "precision": args.precision,
        "pretraining_seconds": seconds,
        "environment": environment(device),
        "scores": scores,
        "history": history,
    }


def pretrain(arguments: Sequence[str], args: argparse.Namespace) -> None:
    """Run examples/pretrain_dogo.py."""
    command = command_of("pretrain_dogo.py", arguments, args.data_dir)
    run_example(command, {"ACCELERATE_MIXED_PRECISION": args.precision})


def encoders(weights: dict[str, Tensor]) -> dict[str, TwoViewNetwork]:
    """Return both networks of a run by the names of their architectures."""
    found = {}
    for place, name in zip(("first", "second"), RECIPE["--models"].split(), strict=True):
        network = TwoViewNetwork(build_model(name, CLASSES))
        prefix = f"{place}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        network.load_state_dict(own)
        found[name] = network.to(memory_format=torch.channels_last).eval()
    return found


@torch.no_grad()
def encoded(network: TwoViewNetwork, data: Labelled, precision: str) -> Tensor:
    """Return the features (N, dim), float32 on the CPU, of all images, not augmented."""
    size, source = int(RECIPE["--image-size"]), SOURCES[RECIPE["--dataset"]]
    device = next(network.parameters()).device
    parts = []
    for pixels in data.pixels.split(int(RECIPE["--batch-size"])):
        images = plain_view(pixels.to(device), size, source)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(network.features(images).float().cpu())
    return torch.cat(parts)


def judge(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, seed: int) -> Scores:
    """Return the accuracies of one encoder; both methods get the same draws of labels for one seed."""

    def fit(chosen: Tensor, given: Tensor) -> float:
        return linear_accuracy(train[chosen], given[chosen], test, test_labels, CLASSES)

    everything = torch.arange(len(labels))
    scores: dict[str, list[float]] = {name: [] for name in ("tenth", "hundredth", "noisy")}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        scores["tenth"].append(fit(few_labels(labels, round(0.1 * len(labels) / CLASSES), generator), labels))
        scores["hundredth"].append(fit(few_labels(labels, round(0.01 * len(labels) / CLASSES), generator), labels))
        scores["noisy"].append(fit(everything, with_noise(labels, 0.4, CLASSES, generator)))
    return {
        "knn": knn_accuracy(train, labels, test, test_labels),
        "linear": fit(everything, labels),
        **{name: statistics.mean(values) for name, values in scores.items()},
    }


def read_cells() -> list[Cell]:
    return [json.loads(file.read_text()) for file in sorted(CELLS.glob("*.json"))]


def tables(cells: list[Cell]) -> str:
    """Return one table per network, of the seeds that all methods have, and what can be said of it."""
    by_method = {method: {cell["seed"]: cell for cell in cells if cell["method"] == method} for method in METHODS}
    seeds = sorted(set.intersection(*(set(found) for found in by_method.values())))
    if len(seeds) < 2:
        return "Too few cells have been run."
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
    return "\n\n".join(parts)


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
    return parser.parse_args()


if __name__ == "__main__":
    main()
