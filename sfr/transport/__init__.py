"""Batched optimal transport between small sets: cost in, feasible plan out."""

from sfr.transport.solve import solve

__all__ = ["solve"]
