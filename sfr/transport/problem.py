"""A batch of transport problems in the form that every solver takes: finite costs, and checked masses of sum 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A batch of problems that any solver can take: finite costs, float32 or float64, and masses that sum to 1."""

    cost: Tensor
    rows: Tensor
    columns: Tensor
    mass: Tensor | None  # what the masses summed to, (B, 1, 1); None for uniform masses of sum 1
    finite: Tensor | None  # which problems had finite costs, (B, 1, 1); None if all
    uniform: bool

    @classmethod
    def of(cls, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Problem:
        cost = cost.to(plan_dtype(cost))
        # One pass where the host may look at the result; a sum that overflows leaves the decision to the second.
        sound = cost.device.type == "cpu" and bool(cost.sum(dim=(1, 2)).isfinite().all())
        finite = None if sound else cost.abs().amax(dim=(1, 2), keepdim=True).isfinite()
        if finite is not None:
            cost = torch.where(finite, cost, 0.0)
        rows, columns = masses_of("a", a, cost, cost.shape[1]), masses_of("b", b, cost, cost.shape[2])
        uniform = a is None and b is None
        if cost.device.type == "cpu" and not uniform:  # on the CPU reading the sums costs no wait
            _check_equal_mass(rows, columns, _rounding(cost, a, b))
        mass = rows.sum(dim=1, keepdim=True)
        return cls(
            cost, _normalised(rows), _normalised(columns), None if uniform else mass[:, :, None], finite, uniform
        )

    def finished(self, plan: Tensor) -> Tensor:
        """Return the plan with the masses asked for, and the independent coupling where the cost is not finite."""
        if self.finite is not None:
            plan = torch.where(self.finite, plan, self.rows[:, :, None] * self.columns[:, None, :])
        return plan if self.mass is None else plan * self.mass


def plan_dtype(cost: Tensor) -> torch.dtype:
    """Return the dtype of the plans of a cost: float64 for float64, else float32."""
    return cost.dtype if cost.dtype == torch.float64 else torch.float32


def masses_of(argument: str, masses: Tensor | None, batch: Tensor, size: int) -> Tensor:
    """Expand the masses of one side to (B, size), checked as far as that costs no wait for the device."""
    count = batch.shape[0]
    if masses is None:
        return batch.new_full((count, size), 1.0 / size)
    if not isinstance(masses, Tensor):
        raise TypeError(f"{argument} must be a tensor; got {type(masses).__name__}")
    if masses.shape not in ((size,), (count, size)):
        raise ValueError(f"{argument} must have shape ({count}, {size}) or ({size},); got {tuple(masses.shape)}")
    if masses.is_complex():
        raise TypeError(f"{argument} must hold real numbers; got {masses.dtype}")
    masses = masses.detach().to(batch)
    if masses.device.type == "cpu" and masses.numel():
        lowest, highest = masses.aminmax()
        if not (lowest >= 0 and highest < torch.inf):  # so are both if one mass is no number
            wrong = masses[~((masses >= 0) & masses.isfinite())]
            raise ValueError(f"{argument} must hold finite masses >= 0; got {wrong[0].item()} (as {masses.dtype})")
    return masses.expand(count, size)


def _rounding(cost: Tensor, *masses: Tensor | None) -> float:
    """Return how far sums of masses meant to be equal may differ, relatively.

    Storing masses rounds each to their dtype; computing and normalising them in float32 (or float64) adds some more,
    which grows with the number of terms.
    """
    dtypes = [each.dtype for each in masses if each is not None and each.is_floating_point()]
    stored = max(torch.finfo(dtype).eps for dtype in [cost.dtype, *dtypes])
    computed = min(stored, torch.finfo(torch.float32).eps)
    return 2 * stored + computed * (16 + sum(cost.shape[1:]) ** 0.5)


def _check_equal_mass(rows: Tensor, columns: Tensor, tolerance: float) -> None:
    """Refuse marginals that no plan can have, and sums that overflow the dtype of the plan."""
    of_rows, of_columns = (side.sum(dim=1, dtype=torch.float64) for side in (rows, columns))
    finfo = torch.finfo(rows.dtype)
    larger = torch.maximum(of_rows, of_columns)
    allowed = tolerance * larger.clamp_min(finfo.tiny)
    differs = ((of_rows - of_columns).abs() > allowed) | ~(larger <= finfo.max)
    if differs.any():
        problem = int(differs.nonzero()[0])
        sums = [side[problem].item() for side in (of_rows, of_columns)]
        digits = 6 if f"{sums[0]:.6g}" != f"{sums[1]:.6g}" else 17
        raise ValueError(
            f"a and b must have the same, finite sum; in problem {problem} they sum to {sums[0]:.{digits}g} and "
            f"{sums[1]:.{digits}g}, which differ by more than rounding or overflow {rows.dtype}: divide each by its sum"
        )


def _normalised(masses: Tensor) -> Tensor:
    """Scale each row to sum 1; a row without any mass becomes uniform (its plan is scaled back to zero)."""
    total = masses.sum(dim=1, keepdim=True)
    return torch.where(total > 0, masses / torch.where(total > 0, total, 1.0), 1.0 / masses.shape[1])
