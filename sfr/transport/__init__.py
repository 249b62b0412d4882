"""Batched optimal transport between small sets: cost in, feasible plan out."""

from sfr.transport.solve import default_solver, emd, solve

__all__ = ["default_solver", "emd", "solve"]
