"""The page docs/models.md, from what was seen of the models."""

from __future__ import annotations

import math
import re

import timm
import torchvision

from benchmarks.common.tables import markdown_table
from benchmarks.models.trials import Record
from benchmarks.models.zoo import TORCHVISION

TITLES = {
    "torchvision": "torchvision, classification",
    r"torchvision\.segmentation": "torchvision, segmentation (logits averaged over pixels)",
    r"torchvision\.video": "torchvision, video",
    r"timm\.[^/]*": "timm, the smallest model of each module",
}
FITTED = 0.95
TRAINING_HEAD = """# Models

## A hundred steps

Made by `python -m benchmarks.models --train` (random weights, one batch of eight random images of the smallest size,
ten classes, AdamW at 1e-3, gradients clipped to norm 1, the default but for
`gate="none"`, so that the term counts in full from the first step; torch {torch}, one core of {device};
commit {commit}, {date}). {tried} of {there} models were trained, the smallest first; of {fitting} that learn the batch
by heart without sfr, {behind} do not with it. The accuracy is the mean of the last ten steps, in training mode. The
share is that of the weighted feature term in the loss; once the labels are fitted it says nothing."""
TRAINED = [
    "model",
    "accuracy, plain",
    "accuracy, sfr",
    "share, first step",
    "share, last step",
    "feature term, largest",
    "last",
]
HEAD = """## One step

Made by `python -m benchmarks.models` (random weights, batch of 2, smallest size the model takes; torch {torch},
torchvision {torchvision}, timm {timm}, one core of {device}; commit {commit}, {date};
[JSON](../benchmarks/results/zoo.json)). Every model is wrapped by `SFRWrapper(model)` without an argument and makes one
training step with `SFRLoss(model)`. It passes if the stages are found, the feature term is finite, and every shallow
stage gets a gradient from its own pairs (in its parameters, or in those before an activation). *Time* is one step
with SFR over one plain step, at a batch of two images on a busy machine: a very rough figure, and no measurement of the
overhead; `python -m benchmarks.step_cost.overhead` is that.

The feature term here is that of the default before (the squared distance). How the stages are found is told in
`sfr/model/choose.py`. In short: of a model most of whose layers lie in equal blocks
at one resolution (transformers, mixers) four blocks are taken, evenly spaced in depth; of any other the last output at
each resolution, of the outermost module; of a model without resolutions the hidden layers. Class, distillation and
register tokens, which are those beyond the cells of the map that the tokens come from, are dropped."""
COUNTED = ["models", "there are", "tried", "pass with no argument", "of those tried"]
TRIED = ["model", "stages found", "layout", "pairs", "feature term", "least gradient", "time"]


def passes(result: Record) -> bool:
    """Whether a model trained with a finite feature term that gives every shallow stage a gradient."""
    return "error" not in result and math.isfinite(result["feature"]) and all(result["gradients"].values())


def page(record: Record) -> str:
    """Return the page of all results in Markdown."""
    results, where = record["models"], record["environment"]
    groups = {title: [key for key in results if re.fullmatch(f"{group}/.*", key)] for group, title in TITLES.items()}
    there = {title: names for title, names in groups.items() if names}
    counts = []
    for title, names in there.items():
        passed = sum(passes(results[name]) for name in names)
        counts.append([title, str(in_all(title)), str(len(names)), str(passed), f"{passed / len(names):.1%}"])
    parts = [training_part(record), f"{HEAD.format(**where['versions'], **where)}\n\n{markdown_table(COUNTED, counts)}"]
    for title, names in there.items():
        parts.append(f"## {title}\n\n{markdown_table(TRIED, (row(name, results[name]) for name in names))}")
    return "\n\n".join(parts) + "\n"


def training_part(record: Record) -> str:
    """Return what the page says of the hundred steps, after its title."""
    results = {key: result["training"] for key, result in record["models"].items() if "training" in result}
    where = record.get("training_environment")
    if where is None:
        return "# Models"
    fitting = {key: r for key, r in results.items() if "error" not in r and r["plain_accuracy"] >= FITTED}
    behind = [key for key, r in fitting.items() if r["sfr_accuracy"] < FITTED]
    counts = {"tried": len(results), "there": len(record["models"]), "fitting": len(fitting), "behind": len(behind)}
    text = TRAINING_HEAD.format(**counts, **where["versions"], **where)
    return f"{text}\n\n{markdown_table(TRAINED, (training_row(key, result) for key, result in results.items()))}"


def training_row(key: str, result: Record) -> list[str]:
    """Return a model's line of the table on the hundred steps."""
    if "error" in result:
        return failed(key, result, len(TRAINED))
    accuracies = [f"{result[name]:.0%}" for name in ("plain_accuracy", "sfr_accuracy")]
    shares = [f"{result[name]:.1%}" for name in ("first_share", "last_share")]
    return [key, *accuracies, *shares, f"{result['largest_term']:.2g}", f"{result['last_term']:.2g}"]


def failed(name: str, result: Record, columns: int) -> list[str]:
    """Return the line of a model that was not to be tried, with the error."""
    return [name, f"**fails**: {' '.join(result['error'].split())}", *[""] * (columns - 2)]


def in_all(title: str) -> int:
    """Return how many models of a group there are, tried or not."""
    group = next(group for group, known in TITLES.items() if known == title).replace("\\", "")
    return len(torchvision.models.list_models(TORCHVISION[group]) if group in TORCHVISION else timm.list_modules())


def row(key: str, result: Record) -> list[str]:
    """Return a model's line of the table on one step."""
    name = key.rpartition("/")[2]
    if "error" in result:
        return failed(name, result, len(TRIED))
    layouts = dict.fromkeys(
        stage["layout"] + (f" ({stage['dropped']} dropped)" if stage["dropped"] else "")
        for stage in result["stages"].values()
    )
    return [
        name,
        ("" if passes(result) else "**fails**: ") + ", ".join(result["stages"]),
        ", ".join(layouts),
        str(result["pairs"]),
        f"{result['feature']:.2g}",
        f"{min(result['gradients'].values()):.1e}",
        f"{result['time_ratio']:.2f}x",
    ]
