"""The problems and the solvers of `python -m benchmarks.transport`: ours, POT's, scipy's and geomloss's."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from ot.lp import emd_wrap
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import sfr
from sfr.config import Solver
from sfr.feature.directions import cross_reference
from sfr.transport import solve
from sfr.transport.scaling import round_to_marginals

SIMPLEX_ITERATIONS = 1_000_000
ENTROPY = 0.05  # regularization of the entropic peers, relative to the deviation of the doubly centred cost
OURS, ONE_THREAD = "sfr exact", "sfr exact, 1 thread"
SIMPLEX, EMD2 = "POT raw simplex loop", "POT emd2 loop"


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

    def figures(self, problem: Problem, plan: Tensor) -> dict[str, Any]:
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
