"""What each arm of the accuracy benchmark costs against vanilla: training time and peak memory.

    python -m benchmarks.step_cost.arm_costs --schedule tenth                      # random images
    python -m benchmarks.step_cost.arm_costs --schedule tenth --data-dir DIR       # those that the cells train on
    python -m benchmarks.step_cost.arm_costs --schedule full-200 --model resnet18  # on a GPU if there is one

All arms live in one process, built and set up as in a cell, and take turns step by step on the same images. Time is
that of the whole training, for that is what a user pays: epochs times (steps of an epoch times the median step, and
what the arm does between two epochs). A step is one on B images whose turn it is: further images that some arms send
through the network besides (CS-KD's partners, DLB's last batch) make it dearer and the epoch no shorter, and an arm
that trains for more epochs pays for them.

Before the measurement every arm trains a little, since features of an untrained network are an easy case for sfr, and
ends an epoch, since some arms have nothing to distil in the first. Memory is the peak of what the tensors of one step
hold, and what the arm keeps between steps: weights, buffers, the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.accuracy.cell import CELLS, Cell
from benchmarks.accuracy.groups import Group, read_groups
from benchmarks.accuracy.methods import known_arm
from benchmarks.accuracy.names import BASE, LADDER, PEERS, comparable
from benchmarks.accuracy.plans import SCHEDULES
from benchmarks.accuracy.runner import KEEP_MEMORY
from benchmarks.accuracy.training import CellRun
from benchmarks.common.data import SOURCES, Parts, load_parts
from benchmarks.common.environment import environment
from benchmarks.common.paths import CACHE
from examples.common.atomic_file import replace_file
from examples.common.data import IMAGE_SIZE, Labelled
from sfr.preflight.cost import compare_steps, wait_for

# Of torch.compile, where many arms share a process: code compiled for one network does not fit those of other hooks,
# and must never be given up silently for there being too much of it.
LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # before 2.7
FAIL = f"fail_on_{LIMIT.replace('size_', '')}_hit"
COMPILER = {"skip_nnmodule_hook_guards": False, LIMIT: 64, FAIL: True}


def main() -> None:
    """Measure the arms asked for, print what they cost and add it to the JSON."""
    args = parse_arguments()
    set_up_as_a_cell(args.device)
    device, schedule = torch.device(args.device), SCHEDULES[args.schedule]
    arms = args.arms or compared_arms(read_groups(CELLS), args.model, args.dataset, schedule.image_size)
    if args.data_dir:
        parts = load_parts(args.dataset, args.data_dir, CACHE, "test")
    else:
        parts = random_parts(SOURCES[args.dataset].num_classes, schedule.per_class or 500)
    cells = [Cell(arm, 0, "test", args.schedule, args.model, args.dataset) for arm in dict.fromkeys([BASE, *arms])]
    runs = {cell.arm: CellRun(cell, schedule, parts, device) for cell in cells}
    with torch._dynamo.config.patch(COMPILER):
        costs = measure(runs, args.repeats, args.train_steps)
    names = ("model", "dataset", "repeats", "train_steps")
    record = {
        "environment": environment(device),
        "settings": {name: getattr(args, name) for name in names} | {"images": "real" if args.data_dir else "random"},
        "schedule": asdict(schedule),
        "arms": costs,
    }
    for arm, cost in costs.items():
        print(f"{arm}: {cost['time_ratio']:.3f}x time, {cost['memory_ratio']:.3f}x memory")
    measured = json.loads(args.output.read_text()) if args.output.exists() else {}
    measured[f"{args.schedule}-{args.dataset}-{args.model}"] = record
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.output, lambda path: path.write_text(json.dumps(measured, indent=1) + "\n"))


def compared_arms(groups: Sequence[Group], model: str, dataset: str, image_size: int) -> list[str]:
    """Return the arms that the tables of such images name, and those that have cells besides."""

    def kind(group: Group) -> tuple[str, str, int]:
        return group.cell["model"], group.cell["dataset"], group.schedule["image_size"]

    found = [arm for group in groups if kind(group) == (model, dataset, image_size) for arm in group.arms]
    return list(dict.fromkeys([*comparable([*PEERS, *LADDER], image_size), *found]))


def set_up_as_a_cell(device: str) -> None:
    """Start this process anew with the allocator and the threads of a cell, unless it has them."""
    wanted = KEEP_MEMORY | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def measure(runs: dict[str, CellRun], repeats: int, train_steps: int) -> dict[str, dict[str, Any]]:
    """Return what the whole training of each arm costs, and its ratio to that of vanilla, which must be there."""
    device = runs[BASE].device
    steps = {arm: endless(run) for arm, run in runs.items()}
    between = {}
    for arm, run in runs.items():
        run.arm.train()
        for _ in range(train_steps):
            steps[arm]()
        between[arm] = seconds_between_epochs(run)
    costs: dict[str, dict[str, Any]] = {}
    for arm, step in compare_steps(steps, device, repeats, warmup=2).items():
        run = runs[arm]
        epoch_steps = len(run.train.labels) // run.schedule.batch_size
        costs[arm] = {
            "step_seconds": step.median,
            "all_step_seconds": [round(seconds, 5) for seconds in step.seconds],
            "training_seconds": run.epochs * (epoch_steps * step.median + between[arm]),
            "peak_bytes": step.peak_bytes + kept_bytes(run),
        }
    base = costs[BASE]
    for cost in costs.values():
        cost["time_ratio"] = cost["training_seconds"] / base["training_seconds"]
        cost["memory_ratio"] = cost["peak_bytes"] / base["peak_bytes"]
    return costs


def endless(run: CellRun) -> Callable[[], Tensor]:
    """Return a function that takes the next step, on the same images as the other arms'."""
    order = torch.randperm(len(run.train.labels), generator=torch.Generator().manual_seed(0))
    size = run.schedule.batch_size
    batches = cycle(order[: len(order) // size * size].split(size))
    return lambda: run.step(next(batches))


def seconds_between_epochs(run: CellRun) -> float:
    wait_for(run.device)
    start = time.perf_counter()
    run.arm.end_epoch()
    wait_for(run.device)
    return time.perf_counter() - start


def kept_bytes(run: CellRun) -> int:
    """Return the bytes of all tensors that a resumed run needs."""
    leaves = tree_leaves((run.arm.state_dict(), run.optimizer.state_dict()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def random_parts(num_classes: int, per_class: int) -> Parts:
    """Return training images of noise, as many of each class; to judge there is one."""
    labels = torch.arange(num_classes).repeat(per_class)
    train = Labelled(torch.randint(0, 256, (len(labels), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8), labels)
    return Parts(train, train.take(torch.tensor([0])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", type=known_arm, help="default: all that the tables name or that have cells")
    add("--schedule", choices=SCHEDULES, default="tenth", help="sets size of the images, batch and augmentation")
    add("--model", default="resnet20", help="as in examples/train_cifar.py")
    add("--dataset", choices=["cifar100", "cifar10"], default="cifar100")
    add("--data-dir", type=Path, help="folder with the data set's Parquet files; random images without it")
    add("--repeats", type=int, default=21, help="timed steps of each arm")
    add("--train-steps", type=int, default=30, help="training before the measurement")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="default costs-DEVICE.json beside the cells; other schedules and models in it stay")
    args = parser.parse_args()
    args.output = args.output or CELLS / f"costs-{args.device}.json"
    return args


if __name__ == "__main__":
    main()
