"""Batched optimal transport between small sets: cost in, feasible plan out."""

from sfr.transport.solve import emd, solve

__all__ = ["emd", "solve"]
