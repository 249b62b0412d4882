"""Any model, two lines, no argument: a training step of every torchvision model and of one model per timm module.

    python -m benchmarks.models                       # what is not yet in the JSON, then the page
    python -m benchmarks.models --only vit pvt        # models whose name contains one of these, again
    python -m benchmarks.models --train               # a hundred steps of those tried, the smallest first
    python -m benchmarks.models --report              # the page alone

Every model has random weights, ten classes, and a batch of two images of the smallest size that it takes. A model
passes if ``SFRWrapper(model)`` finds its stages in the first training forward, the feature term is finite, and every
shallow stage gets a gradient from its own pairs. Each runs in a process of its own, with limits on time and memory.

With --train a network takes a hundred steps on one batch of eight images, plain and with sfr: it must learn by heart
what it learns without, and the feature term must stay bounded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.common.environment import environment
from benchmarks.common.paths import DOCS, RESULTS
from benchmarks.models.page import page, row, training_row
from benchmarks.models.trials import Record, attempt, trained
from benchmarks.models.zoo import zoo

Trial = Callable[[str, str], Record]


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
                record["models"][key] = result = in_process(attempt, name, group, args)
                record["environment"] = where
                args.output.write_text(json.dumps(record, indent=1) + "\n")
                print(" | ".join(row(key, result)), flush=True)
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
            result = in_process(trained, name, group, args)
            if result == too_slow(args.seconds):  # says more of the machine than of the model
                print(f"{key}: not in {args.seconds} s", flush=True)
                continue
            tried[key]["training"] = result
            record["training_environment"] = environment(torch.device("cpu"))
            args.output.write_text(json.dumps(record, indent=1) + "\n")
            print(" | ".join(training_row(key, result)), flush=True)


def in_process(trial: Trial, name: str, group: str, args: argparse.Namespace) -> Record:
    """Return what a trial of a model gives in a process of its own, or that it took too long or its process died."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=child, args=(its, trial, name, group, args.memory))
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


def child(pipe: Any, trial: Trial, name: str, group: str, gigabytes: int) -> None:
    limit = gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    try:
        pipe.send(trial(name, group))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PART", help="models whose name contains one of these, again")
    add("--train", action="store_true", help="let the models that were tried take a hundred steps")
    add("--minutes", type=float, default=60, help="with --train: begin no model after so long")
    add("--report", action="store_true", help="write the page from the JSON, run nothing")
    add("--seconds", type=int, default=300, help="time limit of a model")
    add("--memory", type=int, default=8, help="memory limit of a model, GiB")
    add("--output", type=Path, default=RESULTS / "zoo.json")
    add("--page", type=Path, default=DOCS / "models.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
