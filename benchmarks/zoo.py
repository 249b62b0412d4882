"""Any model, two lines, no argument: a training step of every torchvision model and of one model per timm module.

    python benchmarks/zoo.py                       # what is not yet in the JSON, then the page
    python benchmarks/zoo.py --only vit pvt        # models whose name contains one of these, again
    python benchmarks/zoo.py --train               # a hundred steps of those tried, the smallest first
    python benchmarks/zoo.py --report              # the page alone

Every model has random weights, ten classes, and a batch of two images of the smallest size that it takes. A model
passes if ``SFRWrapper(model)`` finds its stages in the first training forward, the feature term is finite, and every
shallow stage gets a gradient from its own pairs. Each runs in a process of its own, with limits on time and memory.

With --train a network takes a hundred steps on one batch of eight images, plain and with sfr: it must learn by heart
what it learns without, and the feature term must stay bounded.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import sfr
from sfr.model.outputs import logits_in

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from memorise import memorise  # noqa: E402
from overhead import environment  # noqa: E402

Record = dict[str, Any]
Trial = Callable[[str, str, dict[str, Any]], Record]
TORCHVISION = {
    "torchvision": torchvision.models,
    "torchvision.segmentation": torchvision.models.segmentation,
    "torchvision.video": torchvision.models.video,
}
TITLES = {
    "torchvision": "torchvision, classification",
    r"torchvision\.segmentation": "torchvision, segmentation (logits averaged over pixels)",
    r"torchvision\.video": "torchvision, video",
    r"timm\.[^/]*": "timm, the smallest model of each module",
}
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 384)
FRAMES = {"torchvision.video": (16,)}
TRAINED_IMAGES = 8

# What makes a model work that does not without arguments.
ARGUMENTS: dict[str, dict[str, Any]] = {}


def main() -> None:
    """Try the models that are due, one after the other, and write the JSON and the page."""
    args = parse_arguments()
    torch.set_num_threads(1)
    record: Record = {"smallest": {}, "models": {}}
    where = environment(torch.device("cpu"))
    where["versions"]["timm"] = timm.__version__
    if args.output.exists():
        record = json.loads(args.output.read_text())
    if args.train:
        train_all(record, args)
    elif not args.report:
        for group, name in zoo(record["smallest"]):
            key = f"{group}/{name}"
            if any(part in key for part in args.only) if args.only else key not in record["models"]:
                record["models"][key] = result = isolated(name, group, args)
                record["environment"] = where
                args.output.write_text(json.dumps(record, indent=1) + "\n")
                print(row(key, result), flush=True)
    args.page.write_text(page(record))
    print(f"wrote {args.output} and {args.page}")


def train_all(record: Record, args: argparse.Namespace) -> None:
    """Let the models that were tried take a hundred steps, the smallest first, as long as there is time."""
    tried = {key: result for key, result in record["models"].items() if "error" not in result}
    due = [key for key in sorted(tried, key=lambda key: tried[key]["parameters"]) if "training" not in tried[key]]
    end = time.monotonic() + 60 * args.minutes
    for key in due:
        if any(part in key for part in args.only) or not args.only:
            if time.monotonic() > end:
                return
            group, _, name = key.rpartition("/")
            result = in_process(name, group, {}, args, trained)
            if result == too_slow(args.seconds):  # says more of the machine than of the model
                print(f"{key}: not in {args.seconds} s", flush=True)
                continue
            tried[key]["training"] = result
            record["training_environment"] = environment(torch.device("cpu"))
            args.output.write_text(json.dumps(record, indent=1) + "\n")
            print(training_row(key, result), flush=True)


def trained(name: str, group: str, _: Record) -> Record:
    """Train a model and return what was seen."""
    torch.manual_seed(0)
    plain = build(name, group)
    inputs = smallest_input(plain, group)
    images = torch.randn(TRAINED_IMAGES, *inputs.shape[1:])
    return memorise(plain, images, torch.randint(10, (TRAINED_IMAGES,)), logits_of)


def zoo(known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield group and name of every model to try; `known` remembers the smallest model of each timm module."""
    for group, module in TORCHVISION.items():
        for name in torchvision.models.list_models(module=module):
            yield group, name
    for family in timm.list_modules():
        if family not in known:
            known[family] = smallest(family)
        yield f"timm.{family}", known[family]


def smallest(family: str) -> str:
    """Return the architecture of a timm module that has the fewest parameters, without memory for its weights."""

    def size(name: str) -> float:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=10).parameters())

    # Those named test_ are stand-ins of timm's own tests.
    return min((name for name in timm.list_models(module=family) if not name.startswith("test_")), key=size)


def isolated(name: str, group: str, args: argparse.Namespace) -> Record:
    """Try a model in a process of its own, and where it fails again with the argument known to help."""
    result = in_process(name, group, {}, args)
    if "error" in result and name in ARGUMENTS:
        helped = in_process(name, group, ARGUMENTS[name], args)
        result |= {"argument": ARGUMENTS[name], "with_argument": helped}
    return result


def in_process(
    name: str, group: str, config: dict[str, Any], args: argparse.Namespace, trial: Trial | None = None
) -> Record:
    """Return what a trial, by default :func:`attempt`, gives, or that it took too long or its process died."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=child, args=(its, name, group, config, args.memory, trial or attempt))
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(args.seconds) else too_slow(args.seconds)
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.kill()
        process.join()


def too_slow(seconds: int) -> Record:
    return {"error": f"more than {seconds} s"}


def child(pipe: Any, name: str, group: str, config: dict[str, Any], gigabytes: int, trial: Trial) -> None:
    limit = gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    try:
        pipe.send(trial(name, group, config))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def attempt(name: str, group: str, config: dict[str, Any]) -> Record:
    """Wrap a model, run one training step and a few timed ones, and return what was seen."""
    torch.manual_seed(0)
    plain = build(name, group)
    inputs = smallest_input(plain, group)
    target = torch.randint(10, (len(inputs),))
    model = sfr.SFRWrapper(plain.train(), **config)
    criterion = sfr.SFRLoss(model)
    logits = logits_of(model(inputs))
    features = model.sfr.take_features(logits)
    views = {stage: criterion.view_of(stage, feature) for stage, feature in features.items()}
    # Each alone, to see where it sends a gradient.
    terms = {pair: term.value for pair, term in criterion.terms_of(features).items()}
    result = {
        "input": list(inputs.shape[1:]),
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "stages": {
            stage: {"shape": list(feature.shape), "layout": views[stage].layout, "dropped": views[stage].prefix}
            for stage, feature in features.items()
        },
        "pairs": len(terms),
        "feature": float(torch.stack(list(terms.values())).mean()),
        "gradients": gradients(terms, model),
    }
    del features, terms, logits
    return result | {"time_ratio": time_ratio(model, criterion, inputs, target)}


def gradients(terms: dict[str, Tensor], model: sfr.SFRWrapper) -> dict[str, float]:
    """Return by shallow stage the norm of the gradient that its pairs give to its parameters.

    Of a stage without parameters (an activation), to those of the whole model.
    """
    norms = {}
    for stage in dict.fromkeys(pair.split(" <- ")[0] for pair in terms):
        term = torch.stack([value for pair, value in terms.items() if pair.startswith(f"{stage} <- ")]).sum()
        parameters = list(model.sfr.stage(stage).parameters()) or list(model.parameters())
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[stage] = sum(float(gradient.norm()) ** 2 for gradient in found if gradient is not None) ** 0.5
    return norms


def time_ratio(model: sfr.SFRWrapper, criterion: sfr.SFRLoss, inputs: Tensor, target: Tensor) -> float:
    """Return the time of one step with SFR over that of one plain step."""

    def plain_step() -> None:
        with model.disable():
            nn.functional.cross_entropy(logits_of(model(inputs)), target).backward()

    def sfr_step() -> None:
        criterion(logits_of(model(inputs)), target).backward()

    seconds = []
    for step in (plain_step, sfr_step):
        model.zero_grad()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[1] / seconds[0]


def build(name: str, group: str) -> nn.Module:
    if group.startswith("timm."):
        return timm.create_model(name, pretrained=False, num_classes=10)
    arguments: dict[str, Any] = {"weights": None, "num_classes": 10}
    if group == "torchvision.segmentation":
        arguments |= {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": True}
    return torchvision.models.get_model(name, **arguments)


def smallest_input(model: nn.Module, group: str) -> Tensor:
    """Return two random inputs of the smallest size that the model takes in evaluation and training."""
    settings = getattr(model, "default_cfg", {})  # of timm
    if settings.get("fixed_input_size"):
        return torch.randn(2, *settings["input_size"])
    for size in SIZES:
        inputs = torch.randn(2, 3, *FRAMES.get(group, ()), size, size)
        try:
            with torch.no_grad():
                model.train()(inputs)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        return inputs
    raise ValueError(f"{type(model).__name__} takes none of the sizes {SIZES}")


def logits_of(output: Any) -> Tensor:
    """Return the logits of a batch, (B, K): auxiliary ones are left out, those of pixels or tokens averaged."""
    logits = logits_in(output)
    assert logits is not None  # all of these models return some
    if logits.ndim == 3:
        return logits.mean(dim=1)
    return logits.flatten(2).mean(dim=2) if logits.ndim > 3 else logits


def passes(result: Record) -> bool:
    """Whether a model trained with a finite feature term that gives every shallow stage a gradient."""
    return "error" not in result and math.isfinite(result["feature"]) and all(result["gradients"].values())


def page(record: Record) -> str:
    """Return the page of all results in Markdown."""
    results = record["models"]
    groups = {title: [key for key in results if re.fullmatch(f"{group}/.*", key)] for group, title in TITLES.items()}
    where = record["environment"]
    lines = [*training_part(record), HEAD.format(**where["versions"], **where)]
    for title, names in groups.items():
        if names:
            passed = sum(passes(results[name]) for name in names)
            lines += [f"| {title} | {in_all(title)} | {len(names)} | {passed} | {passed / len(names):.1%} |"]
    for title, names in groups.items():
        if names:
            lines += ["", f"## {title}", "", TABLE, *(row(name, results[name]) for name in names)]
    return "\n".join(lines) + "\n"


def training_part(record: Record) -> list[str]:
    """Return the lines of the page on the hundred steps."""
    results = {key: result["training"] for key, result in record["models"].items() if "training" in result}
    where = record.get("training_environment")
    if where is None:
        return ["# Models", ""]
    fitting = {key: r for key, r in results.items() if "error" not in r and r["plain_accuracy"] >= FITTED}
    behind = [key for key, r in fitting.items() if r["sfr_accuracy"] < FITTED]
    text = TRAINING_HEAD.format(
        tried=len(results), there=len(record["models"]), fitting=len(fitting), behind=len(behind), **where["versions"],
        **where,
    )  # fmt: skip
    return [text, *(training_row(key, result) for key, result in results.items()), ""]


def training_row(key: str, result: Record) -> str:
    """Return a model's line of the table on the hundred steps."""
    if "error" in result:
        return f"| {key} | **fails**: {' '.join(result['error'].split())} | | | | | |"
    accuracies = f"{result['plain_accuracy']:.0%} | {result['sfr_accuracy']:.0%}"
    shares = f"{result['first_share']:.1%} | {result['last_share']:.1%}"
    return f"| {key} | {accuracies} | {shares} | {result['largest_term']:.2g} | {result['last_term']:.2g} |"


def in_all(title: str) -> int:
    """Return how many models of a group there are, tried or not."""
    group = next(group for group, known in TITLES.items() if known == title).replace("\\", "")
    return len(torchvision.models.list_models(TORCHVISION[group]) if group in TORCHVISION else timm.list_modules())


FITTED = 0.95
TRAINING_HEAD = """# Models

## A hundred steps

Made by `python benchmarks/zoo.py --train` (random weights, one batch of eight random images of the smallest size, ten
classes, AdamW at 1e-3, gradients clipped to norm 1, the default configuration; torch {torch}, one core of {device};
commit {commit}, {date}). {tried} of {there} models were trained, the smallest first; of {fitting} that learn the batch
by heart without sfr, {behind} do not with it. The accuracy is the mean of the last ten steps, in training mode. The
share is that of the weighted feature term in the loss; once the labels are fitted it says nothing.

| model | accuracy, plain | accuracy, sfr | share, first step | share, last step | feature term, largest | last |
|---|---|---|---|---|---|---|"""
HEAD = """## One step

Made by `python benchmarks/zoo.py` (random weights, batch of 2, smallest size the model takes; torch {torch},
torchvision {torchvision}, timm {timm}, one core of {device}; commit {commit}, {date};
[JSON](../benchmarks/results/zoo.json)). Every model is wrapped by `SFRWrapper(model)` without an argument and makes one
training step with `SFRLoss(model)`. It passes if the stages are found, the feature term is finite, and every shallow
stage gets a gradient from its own pairs (in its parameters, or in those before an activation). *Time* is one step
with SFR over one plain step, at a batch of two images on a busy machine: a very rough figure, and no measurement of the
overhead; `benchmarks/overhead.py` is that.

The feature term here is that of the default before (the squared distance). How the stages are found is told in
`sfr/model/choose.py`. In short: of a model most of whose layers lie in equal blocks
at one resolution (transformers, mixers) four blocks are taken, evenly spaced in depth; of any other the last output at
each resolution, of the outermost module; of a model without resolutions the hidden layers. Class, distillation and
register tokens, which are those beyond the cells of the map that the tokens come from, are dropped.

| models | there are | tried | pass with no argument | of those tried |
|---|---|---|---|---|"""
TABLE = """| model | stages found | layout | pairs | feature term | least gradient | time |
|---|---|---|---|---|---|---|"""


def row(key: str, result: Record) -> str:
    """Return a model's line of the table."""
    name = key.rpartition("/")[2]
    if "error" in result:
        error = " ".join(result["error"].split())
        helped = result.get("with_argument", {})
        works = "works" if helped and passes(helped) else "fails"
        argument = f"; with `{json.dumps(result['argument'])}` it {works}" if helped else ""
        return f"| {name} | **fails**: {error}{argument} | | | | | |"
    layouts = dict.fromkeys(
        stage["layout"] + (f" ({stage['dropped']} dropped)" if stage["dropped"] else "")
        for stage in result["stages"].values()
    )
    verdict = "" if passes(result) else "**fails**: "
    return (
        f"| {name} | {verdict}{', '.join(result['stages'])} | {', '.join(layouts)} | {result['pairs']} | "
        f"{result['feature']:.2g} | {min(result['gradients'].values()):.1e} | {result['time_ratio']:.2f}x |"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PART", help="models whose name contains one of these, again")
    add("--train", action="store_true", help="let the models that were tried take a hundred steps")
    add("--minutes", type=float, default=60, help="with --train: begin no model after so long")
    add("--report", action="store_true", help="write the page from the JSON, run nothing")
    add("--seconds", type=int, default=300, help="time limit of a model")
    add("--memory", type=int, default=8, help="memory limit of a model, GiB")
    add("--output", type=Path, default=ROOT / "benchmarks/results/zoo.json")
    add("--page", type=Path, default=ROOT / "docs/models.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
