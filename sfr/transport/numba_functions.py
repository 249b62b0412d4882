"""How functions are compiled by numba, cached and tried before they are used."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# Every inner loop runs over the columns of one row without a branch, so that it becomes vector instructions. LLVM does
# that for minima of integers and not of floats, hence the minima over the bits of the distances: floats >= 0 have the
# order of their bits. There is no view of an array and no assignment to a slice: either takes seconds to compile.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz", "reassoc", "contract"},
}
# Inlined: else the process that compiles would call what it compiled for them alone, which may round otherwise than
# their copies in the cache, and later processes would not repeat its results.
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
compiled = njit(**INNER)


def column_of_each(cost: list[list[int]], solver: Callable[[Floats, Floats, Floats], None]) -> list[int]:
    """Return the column of each row of one problem, N lists of M costs, by a solver of batches."""
    costs = np.array([cost], np.float32)
    plans, prices = np.zeros_like(costs), np.empty((1, costs.shape[2]), np.float32)
    solver(costs, plans, prices)
    columns: list[int] = plans[0].argmax(axis=1).tolist()
    return columns


def tried(kernel: Any, trial: Callable[[Any], Any], right: Any, cached: bool) -> Callable[..., None]:
    """Return a function of numba's, compiled and tried.

    Args:
        kernel: the function, as decorated by numba.
        trial: calls it and returns what it finds.
        right: what it must find.
        cached: read the machine code from numba's cache on disk. If it is not there, which is so once per machine and
            release, compile it, write it there, and log one line that says so.

    Raises:
        Exception: of any kind, if numba cannot compile, or cannot use its cache.
    """
    if getattr(config, "DISABLE_JIT", False):  # in Python it would be slower than what takes its place
        raise RuntimeError("numba's compiler is switched off (NUMBA_DISABLE_JIT)")
    start = time.perf_counter()
    solver = njit(cache=True, **OPTIONS)(kernel.py_func) if cached else kernel
    found = trial(solver)
    if found != right:
        raise RuntimeError(f"it found {found} where {right} is right")
    if cached and not solver.stats.cache_hits:
        seconds = time.perf_counter() - start
        logger.warning("compiled the transport solver in %.1f s; numba's cache on this machine keeps it", seconds)
    return solver
