"""The peers of `python -m benchmarks.transport` that are measured where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.transport.peers import ENTROPY, Method, Problem, is_assignment, permutation

# Module -> columns of the rows, as the module's fastest way to solve a batch with as many threads as torch has.
ASSIGNMENT: dict[str, Callable[[Any, NDArray[np.float32], int], Any]] = {
    "lap": lambda lap, costs, threads: (
        lap.lapjvr_batch(costs, return_cost=False, n_threads=threads)[1]
        if hasattr(lap, "lapjvr_batch")
        else [lap.lapjv(cost, return_cost=False)[0] for cost in costs]
    ),
    "lapjv": lambda lapjv, costs, threads: [lapjv.lapjv(cost)[0] for cost in costs],
    "lapcpp": lambda lapcpp, costs, threads: lapcpp.lapjv_batch(costs, return_cost=False, n_threads=threads)[1],
    "laprust": lambda laprust, costs, threads: laprust.lapjv_batch(costs, return_cost=False, n_threads=threads)[1],
    "fastlap": lambda fastlap, costs, threads: fastlap.lapjvx_batch(costs, return_cost=False, n_threads=threads)[1],
    "torch_linear_assignment": lambda library, costs, threads: library.batch_linear_assignment(torch.from_numpy(costs)),
}


def optional_methods(device: torch.device) -> tuple[list[Method], list[str]]:
    """Return the solvers that are installed, and a note on each that is missing; all of them run on the CPU."""
    if device.type != "cpu":
        return [], []
    methods, notes = [], []
    for module in ASSIGNMENT:
        if importlib.util.find_spec(module):
            methods.append(Method(distribution(module), assignment(module), None, permutation, is_assignment))
        else:
            notes.append(f"{module.replace('_', '-')} is not installed")
    if importlib.util.find_spec("ott"):
        methods.append(Method("ott-jax", ott_plan, plan=lambda _, plan: torch.from_numpy(np.asarray(plan)).double()))
    else:
        notes.append("ott-jax is not installed")
    return methods, notes


def distribution(module: str) -> str:
    """Return the name of the package that a module came with: `lap` is one of `lap` and one of `lapx`."""
    return sorted(packages_distributions().get(module, [module]))[-1]


def versions() -> dict[str, str]:
    """Return the versions of the installed peers."""
    found = [module for module in (*ASSIGNMENT, "ott") if importlib.util.find_spec(module)]
    return {name: version(name) for name in map(distribution, found)}


def assignment(module: str) -> Callable[[Problem], Any]:
    """Return the step that a package takes for a batch of assignment problems."""
    library = importlib.import_module(module)
    solve = ASSIGNMENT[module]

    def step(problem: Problem) -> Any:
        columns = solve(library, problem.cost.numpy(), torch.get_num_threads())
        return columns if isinstance(columns, torch.Tensor) else np.stack(columns)

    return step


@cache
def ott_solver() -> Callable[..., Any]:
    """Return ott-jax's Sinkhorn over a batch, compiled by jax for each shape."""
    jax = importlib.import_module("jax")
    geometry = importlib.import_module("ott.geometry.geometry")
    linear = importlib.import_module("ott.solvers.linear")

    def plan(cost: Any, a: Any, b: Any, epsilon: float) -> Any:
        return linear.solve(geometry.Geometry(cost, epsilon=epsilon), a=a, b=b, max_iterations=100).matrix

    return jax.jit(jax.vmap(plan, in_axes=(0, 0, 0, None)))


def ott_plan(problem: Problem) -> Any:
    costs, a, b = problem.cost.numpy(), problem.a64.astype(np.float32), problem.b64.astype(np.float32)
    return ott_solver()(costs, a, b, ENTROPY * problem.sigma).block_until_ready()
