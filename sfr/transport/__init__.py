"""Batched optimal transport between small sets: cost in, feasible plan out."""

from sfr.transport.dispatch import certified, default_solver, emd, solve

__all__ = ["certified", "default_solver", "emd", "solve"]
