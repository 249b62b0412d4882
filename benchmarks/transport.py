"""How fast and how good are the transport solvers: ours, POT's, scipy's and geomloss's, on the same problems.

    python benchmarks/transport.py                  # on the CPU, about four minutes
    python benchmarks/transport.py --device cuda    # on a GPU
    python benchmarks/transport.py --quick          # two sizes only

Synthetic feature maps in four cases: `indep` (unrelated maps: hard), `finetune` (one map plus small noise: easy),
`degen` (85 % of the cells nearly alike) and `identical`. Within a case the solvers take turns. All get the same float32
cost; what a peer wants in another form (float64 arrays) is prepared outside of its time. `forward` is plan or value
from the cost (geomloss: from the nodes), `forward + backward` the loss from the nodes and its gradient.

Gap and gradient are those of the plan rounded onto its marginals, so that no plan gains by missing them, against POT's
simplex in float64; how far a plan missed its marginals before is the marginal error, relative to 1/N.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from ot.lp import emd_wrap
from overhead import environment
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import sfr
from sfr.config import Solver
from sfr.losses import cross_reference
from sfr.measure import wait_for
from sfr.transport import solve
from sfr.transport.scaling import round_to_marginals

ROOT = Path(__file__).resolve().parents[1]
CASES = ("indep", "finetune", "degen", "identical")
SIZES = (16, 49, 64, 196, 256)
CHANNELS = 64
SIMPLEX_ITERATIONS = 1_000_000
ENTROPY = 0.05  # regularization of the entropic peers, relative to the deviation of the doubly centred cost
GAP_FLOOR = 1e-7  # gaps below are rounding: the plot draws them here
OURS, ONE_THREAD = "sfr exact", "sfr exact, 1 thread"
SIMPLEX, EMD2 = "POT raw simplex loop", "POT emd2 loop"

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems, in every form that a solver wants."""

    case: str
    masses: str
    shallow: Tensor
    deep: Tensor
    cost: Tensor
    a: Tensor | None
    b: Tensor | None
    costs64: NDArray[np.float64]
    a64: NDArray[np.float64]
    b64: NDArray[np.float64]
    sigma: float


@dataclass(frozen=True)
class Method:
    """A solver: its timed steps, and the plan read from what `forward` returned."""

    name: str
    forward: Callable[[Problem], Any]
    loss: Callable[[Problem, Tensor], Tensor] | None = None  # value from the shallow nodes, to be differentiated
    plan: Callable[[Problem, Any], Tensor] = lambda _, output: output
    accepts: Callable[[Problem], bool] = lambda _: True


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
    device = torch.device(args.device)
    methods, notes = all_methods(device)
    warm_up(methods, device)
    rows: list[Row] = []
    start = time.perf_counter()
    for case, shape, masses in layouts(args.quick):
        problem = make_problem(case, args.batch_size, *shape, CHANNELS, masses, device)
        rows += compare(methods, problem, rows, args)
        print(f"{time.perf_counter() - start:4.0f} s: {case} {shape[0]} x {shape[1]} {masses}", flush=True)
    record = {
        "environment": describe(device),
        "settings": settings(args),
        "notes": notes,
        "goals": goals(rows, device),
        "rows": rows,
        "scaling": list(scaling(args, device)),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, args.plot)
    print(report(record) + f"\n\nwrote {args.output} and {args.plot}")


def layouts(quick: bool) -> Iterable[tuple[str, tuple[int, int], str]]:
    """Yield case, shape and kind of masses, small problems first."""
    for size in (16, 64) if quick else SIZES:
        for case in CASES:
            yield case, (size, size), "uniform"
    for case in CASES[:3]:
        yield case, (49, 64), "uniform"
        yield case, (64, 64), "cross"


def make_problem(
    case: str, batch: int, rows: int, columns: int, channels: int, masses: str, device: torch.device
) -> Problem:
    """Return problems between synthetic maps of `rows` and `columns` cells; the same ones at every call."""
    draws = torch.Generator().manual_seed(0)
    first, second, noise = torch.randn(3, batch, max(rows, columns), channels, generator=draws)
    if case == "finetune":
        second = first + 0.1 * noise
    if case == "identical":
        second = first
    shallow, deep = first[:, :rows].relu(), second[:, :columns].relu()
    if case == "degen":
        shallow, deep = near_duplicates(shallow, draws), near_duplicates(deep, draws)
    exact = squared_cost(shallow.double(), deep.double())
    a, b = cross_reference(shallow, deep) if masses == "cross" else (None, None)
    a64 = torch.full((batch, rows), 1 / rows, dtype=torch.float64) if a is None else a.double()
    b64 = torch.full((batch, columns), 1 / columns, dtype=torch.float64) if b is None else b.double()
    cost = exact.float()
    return Problem(
        case=case,
        masses=masses,
        shallow=shallow.to(device),
        deep=deep.to(device),
        cost=cost.to(device),
        a=None if a is None else a.to(device),
        b=None if b is None else b.to(device),
        costs64=cost.double().numpy(),
        a64=(a64 / a64.sum(dim=1, keepdim=True)).numpy(),
        b64=(b64 / b64.sum(dim=1, keepdim=True)).numpy(),
        sigma=centred_deviation(exact),
    )


def near_duplicates(nodes: Tensor, draws: torch.Generator) -> Tensor:
    """Make 85 % of the cells of each map nearly copies of its first."""
    alike = round(0.85 * nodes.shape[1])
    noise = 0.01 * torch.randn(nodes[:, :alike].shape, generator=draws)
    return torch.cat([(nodes[:, :1] + noise).relu(), nodes[:, alike:]], dim=1)


def squared_cost(shallow: Tensor, deep: Tensor) -> Tensor:
    """Mean over channels of the squared differences, (B, N, M); shared by the peers, for a gradient of their own."""
    norms = shallow.square().sum(dim=2)[:, :, None] + deep.square().sum(dim=2)[:, None, :]
    return torch.baddbmm(norms, shallow, deep.transpose(1, 2), alpha=-2).clamp_min(0.0) / shallow.shape[2]


def centred_deviation(cost: Tensor) -> float:
    """Deviation of the cost without its row and column means, which move no plan; averaged over the batch."""
    centred = cost - cost.mean(dim=2, keepdim=True)
    centred = centred - centred.mean(dim=1, keepdim=True)
    return centred.square().mean(dim=(1, 2)).sqrt().mean().item()


def all_methods(device: torch.device) -> tuple[list[Method], list[str]]:
    """Return the solvers of this installation, and a note on each that is missing."""
    methods = [own_method(name) for name in get_args(Solver) if name != "auto"]
    methods += [
        Method(SIMPLEX, simplex_loop, plan=stacked),
        Method(EMD2, emd2_values, emd2_loss, emd2_plan),
        Method("scipy assignment loop", scipy_loop, None, permutation, is_assignment),
        Method("POT solve_batch, log", solve_batch_plan, solve_batch_loss),
    ]
    notes = []
    if importlib.util.find_spec("geomloss"):
        methods.append(Method("geomloss", lambda p: geomloss_value(p, p.shallow), geomloss_value, geomloss_plan))
    else:
        notes.append("geomloss is not installed")
    if device.type == "cuda":
        if importlib.util.find_spec("torch_linear_assignment"):
            methods.append(Method("torch-linear-assignment", device_assignment, None, permutation, is_assignment))
        else:
            notes.append("torch-linear-assignment is not installed")
    elif torch.get_num_threads() > 1:
        methods.append(Method(ONE_THREAD, partial(single_threaded, own_plan), partial(single_threaded, own_loss)))
    return methods, notes


def is_assignment(problem: Problem) -> bool:
    """Whether an optimal plan is a permutation."""
    return problem.a is None and problem.cost.shape[1] == problem.cost.shape[2]


def own_method(name: Any) -> Method:
    return Method(f"sfr {name}", partial(own_plan, solver=name), partial(own_loss, solver=name))


def own_plan(problem: Problem, solver: Solver = "exact") -> Tensor:
    return solve(problem.cost, problem.a, problem.b, solver)


def own_loss(problem: Problem, shallow: Tensor, solver: Solver = "exact") -> Tensor:
    """Our loss; with the cross-reference masses it computes them itself."""
    marginals: Any = problem.masses
    return sfr.emd_l2(shallow, problem.deep, marginals=marginals, solver=solver)


def single_threaded(step: Callable[..., Tensor], *args: Any) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return step(*args)
    finally:
        torch.set_num_threads(threads)


def simplex_loop(problem: Problem) -> list[NDArray[np.float64]]:
    """POT's network simplex without the Python around it."""
    masses = zip(problem.a64, problem.b64, problem.costs64, strict=True)
    return [emd_wrap.emd_c(a, b, cost, SIMPLEX_ITERATIONS, 1)[0] for a, b, cost in masses]


def stacked(problem: Problem, plans: list[NDArray[np.float64]]) -> Tensor:
    return torch.from_numpy(np.stack(plans))


def scipy_loop(problem: Problem) -> NDArray[np.int64]:
    return np.stack([linear_sum_assignment(cost)[1] for cost in problem.costs64])


def device_assignment(problem: Problem) -> Tensor:
    library = importlib.import_module("torch_linear_assignment")
    return library.batch_linear_assignment(problem.cost)


def permutation(problem: Problem, columns: Any) -> Tensor:
    matches = torch.as_tensor(columns).cpu().long()
    size = matches.shape[1]
    return torch.zeros(len(matches), size, size, dtype=torch.float64).scatter_(2, matches[:, :, None], 1.0 / size)


def emd2_of(problem: Problem, cost: Tensor, **options: Any) -> list[Any]:
    """POT's public function, once per problem, on torch tensors."""
    if problem.a is None or problem.b is None:
        return [ot.emd2([], [], one, **options) for one in cost]
    return [ot.emd2(a, b, one, **options) for a, b, one in zip(problem.a, problem.b, cost, strict=True)]


def emd2_values(problem: Problem) -> Tensor:
    return torch.stack(emd2_of(problem, problem.cost))


def emd2_loss(problem: Problem, shallow: Tensor) -> Tensor:
    return torch.stack(emd2_of(problem, squared_cost(shallow, problem.deep))).mean()


def emd2_plan(problem: Problem, _: Tensor) -> Tensor:
    return torch.stack([log["G"] for _, log in emd2_of(problem, problem.cost, return_matrix=True)])


def batch_result(problem: Problem, cost: Tensor) -> Any:
    """POT's batched solver; always with `reg`, without which release 0.9.7 returns the independent coupling."""
    reg = ENTROPY * problem.sigma
    return ot.solve_batch(cost, reg=reg, a=problem.a, b=problem.b, method="log_sinkhorn", max_iter=100)


def solve_batch_plan(problem: Problem) -> Tensor:
    return batch_result(problem, problem.cost).plan


def solve_batch_loss(problem: Problem, shallow: Tensor) -> Tensor:
    return batch_result(problem, squared_cost(shallow, problem.deep)).value_linear.mean()


def geomloss_result(problem: Problem, shallow: Tensor, potentials: bool = False) -> Any:
    """Call geomloss's batched Sinkhorn, scaled so that its ground cost |x - y|^2 / 2 is ours."""
    scale = math.sqrt(2 / shallow.shape[2])
    blur = math.sqrt(ENTROPY * problem.sigma)
    geomloss = importlib.import_module("geomloss")
    loss = geomloss.SamplesLoss("sinkhorn", blur=blur, debias=False, potentials=potentials, backend="tensorized")
    x, y = scale * shallow, scale * problem.deep
    return loss(x, y) if problem.a is None else loss(problem.a, x, problem.b, y)


def geomloss_value(problem: Problem, shallow: Tensor) -> Tensor:
    return geomloss_result(problem, shallow).mean()


def geomloss_plan(problem: Problem, _: Tensor) -> Tensor:
    f, g = (each.cpu().double() for each in geomloss_result(problem, problem.shallow, potentials=True))
    a, b = torch.from_numpy(problem.a64), torch.from_numpy(problem.b64)
    exponent = (f[:, :, None] + g[:, None, :] - torch.from_numpy(problem.costs64)) / (ENTROPY * problem.sigma)
    return a[:, :, None] * b[:, None, :] * exponent.exp()


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


@dataclass(frozen=True)
class Reference:
    """The exact optimum of a problem and its gradient, in float64."""

    optimum: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Reference:
        plan = stacked(problem, simplex_loop(problem))
        optimum = (plan * torch.from_numpy(problem.costs64)).sum(dim=(1, 2))
        return cls(optimum, gradient(problem, plan))

    def figures(self, problem: Problem, plan: Tensor) -> Row:
        """Return gap, marginal error relative to 1/N and cosine of the gradient, of a plan in float64."""
        cost = torch.from_numpy(problem.costs64)
        a, b = torch.from_numpy(problem.a64), torch.from_numpy(problem.b64)
        rounded = on_marginals(plan, a, b)
        value = (rounded * cost).sum(dim=(1, 2))
        # Where the optimum is zero a gap relative to it says nothing: the mean cost takes its place.
        scale = torch.where(self.optimum > 1e-6 * cost.mean(dim=(1, 2)), self.optimum, cost.mean(dim=(1, 2)))
        errors = (plan.sum(dim=2) - a).abs().max() * a.shape[1], (plan.sum(dim=1) - b).abs().max() * b.shape[1]
        return {
            "gap": finite(((value - self.optimum) / scale).mean()),
            "marginal_error": finite(torch.stack(errors).max()),
            "gradient_cosine": self.cosine(gradient(problem, rounded)),
        }

    def cosine(self, other: Tensor) -> float | None:
        """Mean over the batch; none where the exact gradient is zero."""
        exact, other = self.gradient.flatten(1), other.flatten(1)
        if (exact.norm(dim=1) < 1e-9).any():
            return None
        return finite(torch.nn.functional.cosine_similarity(exact, other).mean())


def gradient(problem: Problem, plan: Tensor) -> Tensor:
    """Gradient of the transport cost by the shallow nodes with the plan held constant (envelope theorem)."""
    shallow, deep = problem.shallow.cpu().double(), problem.deep.cpu().double()
    return 2 / shallow.shape[2] * (plan.sum(dim=2, keepdim=True) * shallow - plan @ deep)


def on_marginals(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Scale a plan by rows and columns and round it onto its marginals.

    Scaled first, as Sinkhorn does: a plan that misses them by float32 rounding stays what it was.
    """
    plan = plan * (a / plan.sum(dim=2).clamp_min(1e-300))[:, :, None]
    plan = plan * (b / plan.sum(dim=1).clamp_min(1e-300))[:, None, :]
    return round_to_marginals(plan, a, b)


def finite(value: Tensor) -> float | None:
    """A number that JSON can hold."""
    number = value.item()
    return number if math.isfinite(number) else None


def scaling(args: argparse.Namespace, device: torch.device) -> Iterable[Row]:
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
                yield row


def goals(rows: list[Row], device: torch.device) -> list[str]:
    """Say of each goal whether it was reached, or by how much it was missed."""
    return list(cpu_goals(rows) if device.type == "cpu" else gpu_goals(rows))


def cpu_goals(rows: list[Row]) -> Iterable[str]:
    wanted = [("forward_seconds", SIMPLEX, 5.0, "forward"), ("both_seconds", EMD2, 15.0, "forward + backward")]
    for key, peer, goal, what in wanted:
        for case in CASES:
            for name in (OURS, ONE_THREAD):
                ours, theirs = find(rows, name, case, 64), find(rows, peer, case, 64)
                if ours.get(key) and theirs.get(key):
                    yield f"{name}, {what}, {case} 64: {times(theirs[key] / ours[key], goal)} of the {peer}"


def times(ratio: float, goal: float) -> str:
    verdict = "reached" if ratio >= goal else f"missed by a factor of {goal / ratio:.2f}"
    return f"{verdict} (goal {goal:.0f}x): {ratio:.1f}x the speed"


def gpu_goals(rows: list[Row]) -> Iterable[str]:
    """The limits hold for a batch of 256."""
    for label, limit, most in (("approximate", 60e-6, 1e-3), ("exact", 150e-6, 1e-6)):
        for case in CASES:
            own = [row for row in rows if row["solver"].startswith("sfr") and fits(row, case, 64)]
            good = [row for row in own if row.get("gap") is not None and row["gap"] <= most]
            if good:
                best = min(good, key=lambda row: row["forward_seconds"])
                seconds = best["forward_seconds"]
                verdict = "reached" if seconds <= limit else f"missed by a factor of {seconds / limit:.2f}"
                yield f"{label}, {case} 64: {verdict}: {seconds * 1e6:.0f} us, {best['solver']}, gap {best['gap']:.1e}"
            else:
                yield f"{label}, {case} 64: missed: no solver of ours has a gap of {most:.0e} or less"


def fits(row: Row, case: str, size: int, other: int | None = None, masses: str = "uniform") -> bool:
    return (row["case"], row["n"], row["m"], row["masses"]) == (case, size, other or size, masses)


def find(rows: list[Row], solver: str, case: str, *layout: Any) -> Row:
    """Return the row asked for, empty if it was not measured."""
    return next((row for row in rows if row["solver"] == solver and fits(row, case, *layout)), {})


def report(record: dict[str, Any]) -> str:
    """Return the tables and the goals as markdown."""
    rows = record["rows"]
    parts = [
        f"### N = M = {size}\n\n{table(rows, size)}" for size in sorted({r["n"] for r in rows if r["n"] == r["m"]})
    ]
    parts.append(f"### N = 49, M = 64\n\n{table(rows, 49, 64)}")
    parts.append(f"### N = M = 64, cross-reference masses\n\n{table(rows, 64, 64, 'cross')}")
    parts.append(f"### Growth of the default solver, `indep`, ms\n\n{scaling_table(record['scaling'])}")
    parts.append("### Goals\n\n" + "\n".join(f"- {line}" for line in record["goals"] + record["notes"]))
    return "\n\n".join(["", *parts])


def table(rows: list[Row], *layout: Any) -> str:
    """Return one line per solver: time and its ratio to our exact solver's, then quality."""
    cases = [case for case in CASES[:3] if any(fits(row, case, *layout) for row in rows)]
    names = list(dict.fromkeys(row["solver"] for row in rows))
    heads = [f"{case} {what}" for case in cases for what in ("ms", "fwd + bwd, ms", "gap")]
    heads += ["worst marginal error", "worst gradient cosine"]
    lines = ["| solver | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        found = [find(rows, name, case, *layout) for case in cases]
        if not any("forward_seconds" in row for row in found):
            continue
        ours = [find(rows, OURS, case, *layout).get("forward_seconds") for case in cases]
        cells = [cell for row, base in zip(found, ours, strict=True) for cell in figures_of(row, base)]
        errors = [row["marginal_error"] for row in found if row.get("marginal_error") is not None]
        cosines = [row["gradient_cosine"] for row in found if row.get("gradient_cosine") is not None]
        cells += [f"{max(errors):.0e}" if errors else "", f"{min(cosines):.4f}" if cosines else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures_of(row: Row, base: float | None) -> list[str]:
    if "forward_seconds" not in row:
        return ["skipped", "", ""]
    seconds, both, gap = row["forward_seconds"], row["both_seconds"], row["gap"]
    ratio = f" ({seconds / base:.2g}x)" if base else ""
    return [
        milliseconds(seconds) + ratio,
        milliseconds(both) if both else "",
        "none" if gap is None else "exact" if gap <= GAP_FLOOR else f"{gap:.1e}",
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"


def scaling_table(rows: list[Row]) -> str:
    sizes = sorted({row["n"] for row in rows})
    lines = ["| B | D | " + " | ".join(f"N = {size}" for size in sizes) + " |", "|---" * (len(sizes) + 2) + "|"]
    for batch, channels in dict.fromkeys((row["batch"], row["channels"]) for row in rows):
        own = [row for row in rows if (row["batch"], row["channels"]) == (batch, channels)]
        cells = [
            milliseconds(r["forward_seconds"]) + (f" / {milliseconds(r['both_seconds'])}" if r["both_seconds"] else "")
            for r in own
        ]
        lines.append(f"| {batch} | {channels} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nForward from the cost / forward + backward from the nodes."


def draw(rows: list[Row], path: Path) -> None:
    """Draw time against gap at N = 64: the lower left is the frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    shown = [row for row in rows if any(fits(row, case, 64) for case in CASES) and row.get("gap") is not None]
    names = list(dict.fromkeys(row["solver"] for row in shown))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    markers = dict(zip(CASES, ("o", "s", "^", "D"), strict=True))
    exact = [name for name in names if any(row["solver"] == name and row["gap"] <= GAP_FLOOR for row in shown)]
    heights = {name: GAP_FLOOR * 2.0 ** -(k + 1) for k, name in enumerate(exact)}  # one line each, or they hide another
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    lowest = GAP_FLOOR * 2.0 ** -(len(exact) + 1)
    axes.axhspan(lowest, GAP_FLOOR, color="0.93", zorder=0)
    label = f"exact: gap of {GAP_FLOOR:.0e} or less (height without meaning)"
    axes.text(0.99, GAP_FLOOR * 1.3, label, transform=axes.get_yaxis_transform(), ha="right", color="0.35", fontsize=9)
    for row in shown:
        height = row["gap"] if row["gap"] > GAP_FLOOR else heights[row["solver"]]
        look: dict[str, Any] = {"color": colours[row["solver"]], "marker": markers[row["case"]], "edgecolor": "white"}
        axes.scatter(row["forward_seconds"] * 1e3, height, s=70, linewidth=0.6, alpha=0.9, zorder=3, **look)
    axes.set(xscale="log", yscale="log", xlabel=f"forward time of a batch of {shown[0]['batch']}, ms")
    axes.set(ylabel="gap to the optimum, relative", title="Transport solvers, N = M = 64, uniform masses")
    highest = max(row["gap"] for row in shown)
    axes.set_ylim(lowest, max(highest * 3, 1e-2))
    axes.set_yticks([10.0**k for k in range(-6, 1) if 10.0**k < highest * 3])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    solvers = [Line2D([], [], color=colours[n], marker="o", linestyle="", label=n) for n in names]
    hollow: dict[str, Any] = {"color": "black", "markerfacecolor": "none", "linestyle": ""}
    cases = [Line2D([], [], marker=markers[c], label=c, **hollow) for c in CASES]
    gap = Line2D([], [], linestyle="", label=" ")
    figure.legend(handles=[*solvers, gap, *cases], loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def settings(args: argparse.Namespace) -> Row:
    names = ("batch_size", "quick", "repeats", "budget", "limit")
    return {name: getattr(args, name) for name in names} | {"channels": CHANNELS, "entropy_of_peers": ENTROPY}


def describe(device: torch.device) -> Row:
    """Return the environment of the measurement, with the peers that only this benchmark has."""
    found = environment(device)
    for module, name in (("geomloss", "geomloss"), ("torch_linear_assignment", "torch-linear-assignment")):
        if importlib.util.find_spec(module):
            found["versions"][name] = version(name)
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
    args = parser.parse_args()
    suffix = "-quick" if args.quick else ""
    args.output = args.output or ROOT / "benchmarks" / "results" / f"transport-{args.device}{suffix}.json"
    in_docs = ROOT / "docs" / ("transport.png" if args.device == "cpu" else f"transport-{args.device}.png")
    args.plot = args.plot or (args.output.with_suffix(".png") if args.quick else in_docs)
    return args


if __name__ == "__main__":
    main()
