"""Does DoGo help: ResNet-8 and ResNet-20 pre-trained together or alone on CIFAR-10, then judged as frozen encoders.

    python -m benchmarks.pretrain.dogo --data-dir DIR      # the cells of ten epochs, about 40 minutes on one core
    python -m benchmarks.pretrain.dogo --data-dir DIR --epochs 50
    python -m benchmarks.pretrain.dogo --report            # the tables of docs/dogo.md from the cells that are there

A cell is one method, one seed and one recipe, and one JSON file; a cell that has its file is not run again. All
methods run examples/pretrain_dogo.py with one recipe: for one seed they share initial weights, order of the images and
views, so that their difference is paired. "Colder" is a control: a network alone, its similarities at the temperature
of the mutual term. The result is that of the last epoch.

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
from benchmarks.common.paired import differences, spread
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
    "--batch-size": "256",
    "--lr": "0.001",
}
METHODS = {"alone": "--method alone", "colder": "--method alone --temperature 0.1", "together": "--method dogo"}
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
            for method in args.methods:
                file = CELLS / f"{args.objective}-{args.image_size}px-{args.epochs}-{method}-seed{seed}.json"
                if file.exists():
                    print(f"{file.name} is there")
                else:
                    cell = run_cell(method, seed, splits, args)
                    replace_text(file, json.dumps(cell, indent=1) + "\n")
    PAGE.write_text(page_with(PAGE, tables(read_cells()), MARK))
    print(f"wrote {PAGE}")


def run_cell(method: str, seed: int, splits: Splits, args: argparse.Namespace) -> Cell:
    """Pre-train the pair by the example's command and judge both encoders."""
    recipe = RECIPE | {"--objective": args.objective, "--image-size": args.image_size, "--epochs": args.epochs}
    options = " ".join(f"{name} {value}" for name, value in recipe.items())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [*options.split(), *METHODS[method].split()]
        pretrain([*own, "--seed", str(seed), "--output-dir", str(folder / "run")], args)
        history = history_of(folder / "run")
        weights = torch.load(folder / "run" / "model.pt", weights_only=True)
    seconds = round(time.perf_counter() - start, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = {}
    for name, model in encoders(weights).items():
        train, test = (encoded(model.to(device), part.data, args) for part in (splits.train, splits.test))
        scores[name] = judge(train, splits.train.data.labels, test, splits.test.data.labels, seed)
        print(method, seed, name, scores[name], flush=True)
    return {
        "method": method,
        "seed": seed,
        "recipe": options,
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
def encoded(network: TwoViewNetwork, data: Labelled, args: argparse.Namespace) -> Tensor:
    """Return the features (N, dim), float32 on the CPU, of all images, not augmented."""
    source = SOURCES[RECIPE["--dataset"]]
    device = next(network.parameters()).device
    parts = []
    for pixels in data.pixels.split(int(RECIPE["--batch-size"])):
        images = plain_view(pixels.to(device), args.image_size, source)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
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
    """Return the tables of each recipe."""
    recipes = sorted({(cell["recipe"], cell["precision"]) for cell in cells}, key=lambda recipe: recipe[0].split())
    alike = ([cell for cell in cells if (cell["recipe"], cell["precision"]) == recipe] for recipe in recipes)
    return "\n\n".join(map(tables_of_recipe, alike)) or "No cells have been run."


def tables_of_recipe(cells: list[Cell]) -> str:
    """Return one table per network, and what was run."""
    scores = {
        method: {cell["seed"]: cell["scores"] for cell in cells if cell["method"] == method} for method in METHODS
    }
    there = [method for method in METHODS if scores[method]]
    parts = [f"`pretrain_dogo.py {cells[0]['recipe']}`, precision {cells[0]['precision']}:"]
    for model in RECIPE["--models"].split():
        rows = []
        for measure, label in MEASURES.items():
            found = {
                method: {seed: score[model][measure] for seed, score in scores[method].items()} for method in there
            }
            reached = [f"{spread([100 * value for value in found[method].values()])}" for method in there]
            gains = [gain(found["together"], found[other]) for other in there[:-1]] if "together" in there else []
            rows.append([label, *reached, *gains])
        against = [f"together against {other}" for other in there[:-1]] if "together" in there else []
        parts.append(f"### {model}\n\n{markdown_table(['accuracy, %', *there, *against], rows)}")
    return "\n\n".join(parts)


def gain(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Return the mean difference in points, ± standard deviation, and how many seeds agree."""
    paired = differences(ours, theirs)
    return f"{spread(paired, sign='+')} ({sum(each > 0 for each in paired)} of {len(paired)})" if paired else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-10's Parquet files, in place of the Hub")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--objective", choices=["simclr", "simsiam"], default="simclr")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
