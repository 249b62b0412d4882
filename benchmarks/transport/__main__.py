"""How fast and how good are the transport solvers, ours and those of other packages, on the same problems.

    python -m benchmarks.transport                  # on the CPU, about four minutes
    python -m benchmarks.transport --device cuda    # on a GPU
    python -m benchmarks.transport --quick          # two sizes only
    python -m benchmarks.transport --report         # runs nothing, writes docs/transport.md from its JSON

Synthetic feature maps in four cases: `indep` (unrelated maps: hard), `finetune` (one map plus small noise: easy),
`degen` (85 % of the cells nearly alike) and `identical`. Within a case the solvers take turns. All get the same float32
cost; what a peer wants in another form (float64 arrays) is prepared outside of its time. `forward` is plan or value
from the cost (geomloss: from the nodes), `forward + backward` the loss from the nodes and its gradient.

Gap and gradient are those of the plan rounded onto its marginals, so that no plan gains by missing them, against POT's
simplex in float64; how far a plan missed its marginals before is the marginal error, relative to 1/N.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.environment import environment
from benchmarks.common.paths import DOCS, RESULTS
from benchmarks.transport.optional import optional_methods, versions
from benchmarks.transport.peers import (
    ENTROPY,
    Method,
    Problem,
    Reference,
    all_methods,
    make_problem,
    own_loss,
    own_plan,
)
from benchmarks.transport.report import CASES, Row, draw, goals, publish, report
from sfr.preflight.cost import wait_for

SIZES = (16, 49, 64, 196, 256)
CHANNELS = 64
FLOAT_BYTES = 4


@dataclass
class Run:
    """What was measured of one method on one problem."""

    method: Method
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    first: float = 0.0
    figures: Row = field(default_factory=dict)


def main() -> None:
    """Measure all cases and the growth with the size, print the tables, write the JSON and draw the plot."""
    args = parse_arguments()
    if args.report:
        publish(json.loads(args.output.read_text()), args.page or DOCS / "transport.md")
        return
    device = torch.device(args.device)
    methods, notes = all_methods(device)
    others, missing = optional_methods(device)
    methods, notes = methods + others, notes + missing
    warm_up(methods, device)
    rows: list[Row] = []
    start = time.perf_counter()
    for case, shape, masses in layouts(args.quick):
        problem = make_problem(case, args.batch_size, *shape, CHANNELS, masses, device)
        rows += compare(methods, problem, rows, args)
        print(f"{time.perf_counter() - start:4.0f} s: {case} {shape[0]} x {shape[1]} {masses}", flush=True)
    record: Row = {
        "environment": describe(device),
        "settings": settings(args),
        "notes": notes,
        "goals": goals(rows, device),
        "rows": rows,
        "limits": limits(device),
    }
    record["scaling"] = list(scaling(args, device, **record["limits"]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, args.plot)
    print(report(record) + f"\n\nwrote {args.output} and {args.plot}")
    if args.page:
        publish(record, args.page)


def layouts(quick: bool) -> Iterable[tuple[str, tuple[int, int], str]]:
    """Yield case, shape and kind of masses, small problems first."""
    for size in (16, 64) if quick else SIZES:
        for case in CASES:
            yield case, (size, size), "uniform"
    for case in CASES[:3]:
        yield case, (64, 16), "uniform"
        yield case, (49, 64), "uniform"
        yield case, (64, 64), "cross"


def warm_up(methods: list[Method], device: torch.device) -> None:
    """Compile and import whatever loads at the first call; a failure shows again in the measurement."""
    problem = make_problem("indep", 4, 16, 16, CHANNELS, "uniform", device)
    for method in methods:
        try:
            method.forward(problem)
            if method.loss is not None:
                differentiate(method.loss, problem)
        except Exception as error:
            print(f"{method.name} failed to warm up: {error}")


def compare(methods: list[Method], problem: Problem, before: list[Row], args: argparse.Namespace) -> list[Row]:
    """Measure every method on one problem, in turns, and return their rows."""
    shape = list(problem.cost.shape)
    head = {"case": problem.case, "batch": shape[0], "n": shape[1], "m": shape[2], "masses": problem.masses}
    reference = Reference.of(problem)
    rows, runs = [], []
    for method in methods:
        row: Row = head | {"solver": method.name}
        rows.append(row)
        predicted = predict(before, row)
        if not method.accepts(problem):
            row["skipped"] = "not a problem of this solver"
        elif predicted > args.limit:
            row["skipped"] = f"about {predicted:.0f} s per run expected"
        else:
            try:
                run = first_run(method, problem, reference, predicted)
                runs.append((row, run))
            except Exception as error:  # a peer that fails is part of the result
                row["skipped"] = f"{type(error).__name__}: {str(error)[:200]}"
    take_turns([run for _, run in runs], problem, args)
    for row, run in runs:
        forward, both = run.forward or [run.first], run.both
        row |= {"forward_seconds": statistics.median(forward), "forward_repeats": len(forward)}
        row |= {"both_seconds": statistics.median(both) if both else None, "both_repeats": len(both)} | run.figures
    return rows


def predict(before: list[Row], row: Row) -> float:
    """Extrapolate a solver's time from the next smaller size of the same case."""
    alike = [old for old in before if all(old[key] == row[key] for key in ("case", "masses", "solver"))]
    timed_rows = [old for old in alike if "forward_seconds" in old and old["n"] * old["m"] < row["n"] * row["m"]]
    if not timed_rows:
        return 0.0
    last = timed_rows[-1]
    return last["forward_seconds"] * (row["n"] * row["m"] / (last["n"] * last["m"])) ** 1.2


def first_run(method: Method, problem: Problem, reference: Reference, expected: float) -> Run:
    """Run once for the figures of quality and memory, and to learn how many repeats are affordable."""
    device = problem.cost.device
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    seconds, output = timed(lambda: method.forward(problem), device)
    if seconds > 3 * max(expected, 0.2):  # it compiled or imported something
        seconds, output = timed(lambda: method.forward(problem), device)
    peak = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else None
    plan = method.plan(problem, output).detach().cpu().double()
    return Run(method, first=seconds, figures=reference.figures(problem, plan) | {"peak_bytes": peak})


def take_turns(runs: list[Run], problem: Problem, args: argparse.Namespace) -> None:
    """Time the methods in turn, so that a noisy machine disturbs all alike; slow ones less often."""
    device = problem.cost.device
    for turn in range(args.repeats):
        for run in runs:
            if turn >= max(1, int(args.budget / run.first)):
                continue
            if run.first <= args.budget:  # else the first run, of which nothing needs a warm-up, is the time
                run.forward.append(repeated(partial(run.method.forward, problem), device, run.first))
            if run.method.loss is None or (run.forward or [run.first])[-1] > 2 * args.budget:
                continue
            step = partial(differentiate, run.method.loss, problem)
            try:
                if turn == 0:
                    step()  # warm up
                run.both.append(repeated(step, device, run.first))
            except Exception as error:  # it has a forward all the same
                run.figures["both_skipped"] = f"{type(error).__name__}: {str(error)[:200]}"


def repeated(step: Callable[[], Any], device: torch.device, first: float) -> float:
    """Time a step; on a GPU many launches together if they are short, as a training step would queue them."""
    calls = 20 if device.type == "cuda" and first < 0.005 else 1

    def many() -> None:
        for _ in range(calls):
            step()

    return timed(many, device)[0] / calls


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    wait_for(device)
    start = time.perf_counter()
    output = step()
    wait_for(device)
    return time.perf_counter() - start, output


def differentiate(loss: Callable[[Problem, Tensor], Tensor], problem: Problem) -> None:
    shallow = problem.shallow.detach().requires_grad_()
    loss(problem, shallow).backward()


def limits(device: torch.device) -> dict[str, float]:
    """Measure what the device can do at most: float32 operations per second, and bytes read and written."""
    side, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    matrix, values = torch.rand(side, side, device=device), torch.rand(count, device=device)
    copy = torch.empty_like(values)

    def best(step: Callable[[], Any]) -> float:
        return min(timed(step, device)[0] for _ in range(10))

    return {
        "operations": 2 * side**3 / best(lambda: matrix @ matrix),
        "bandwidth": 2 * FLOAT_BYTES * count / best(lambda: copy.copy_(values)),
    }


def least_seconds(batch: int, size: int, channels: int, operations: float, bandwidth: float) -> float:
    """Roofline of the loss, forward and backward, whatever the solver: its matrix products, and its inputs and outputs.

    The products are the cost and the gradient of the shallow nodes. Forward reads both sets of nodes and writes the
    plan; backward reads the three and writes the gradient.
    """
    nodes, plan = batch * size * channels, batch * size**2
    return max(4 * plan * channels / operations, FLOAT_BYTES * (5 * nodes + 2 * plan) / bandwidth)


def scaling(args: argparse.Namespace, device: torch.device, operations: float, bandwidth: float) -> Iterable[Row]:
    """Yield how the time of the default solver grows with batch, size and channels."""
    method = Method("sfr auto", partial(own_plan, solver="auto"), partial(own_loss, solver="auto"))
    for channels in (64,) if args.quick else (64, 512):
        for batch in (32, 128, 512):
            for size in (16, 64) if args.quick else SIZES:
                problem = make_problem("indep", batch, size, size, channels, "uniform", device)
                method.forward(problem)  # may compile for the new shape
                run = Run(method, first=timed(partial(method.forward, problem), device)[0])
                take_turns([run], problem, args)
                row: Row = {"case": "indep", "batch": batch, "n": size, "channels": channels}
                row["forward_seconds"] = statistics.median(run.forward or [run.first])
                row["both_seconds"] = statistics.median(run.both) if run.both else None
                row["least_seconds"] = least_seconds(batch, size, channels, operations, bandwidth)
                yield row


def settings(args: argparse.Namespace) -> Row:
    names = ("batch_size", "quick", "repeats", "budget", "limit")
    return {name: getattr(args, name) for name in names} | {"channels": CHANNELS, "entropy_of_peers": ENTROPY}


def describe(device: torch.device) -> Row:
    """Return the environment of the measurement, with the peers that only this benchmark has."""
    found = environment(device)
    for module, name in (("geomloss", "geomloss"), ("torch_linear_assignment", "torch-linear-assignment")):
        if importlib.util.find_spec(module):
            found["versions"][name] = version(name)
    found["versions"] |= versions() if device.type == "cpu" else {}
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--quick", action="store_true", help="two sizes only")
    add("--batch-size", type=int, default=128)
    add("--repeats", type=int, default=3, help="most timed runs of each solver in each case")
    add("--budget", type=float, default=0.3, help="seconds of each solver in each case: the slow repeat less")
    add("--limit", type=float, default=3.0, help="skip what would take more seconds than this per run")
    add("--output", type=Path, help="default benchmarks/results/transport-DEVICE.json")
    add("--plot", type=Path, help="default docs/transport.png; beside the JSON with --quick")
    add("--report", action="store_true", help="run nothing, write the page from the JSON")
    add("--page", type=Path, help="markdown page whose tables are replaced, as in --page docs/transport.md")
    args = parser.parse_args()
    suffix = "-quick" if args.quick else ""
    args.output = args.output or RESULTS / f"transport-{args.device}{suffix}.json"
    in_docs = DOCS / ("transport.png" if args.device == "cpu" else f"transport-{args.device}.png")
    args.plot = args.plot or (args.output.with_suffix(".png") if args.quick else in_docs)
    return args


if __name__ == "__main__":
    main()
