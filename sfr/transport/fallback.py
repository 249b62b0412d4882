"""Faster solvers that are optional: loaded when first needed, abandoned with one warning if they fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Not the solver's fault: the batch is too large. Callers catch this error to try a smaller batch.
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class OptionalSolver(Generic[Arguments, Result]):
    """A solver that needs an optional package, which may be missing, or installed and broken.

    It is loaded at the first call. If loading fails, or the solver fails at this or a later call, one warning gives the
    reason and the solver is not tried again in this process. There is no warning for a package that is not installed.
    Running out of memory is raised as usual.

    Args:
        package: import name of the package.
        load: imports and prepares the solver.
        failure: what does not work and what is used instead; the warning adds the reason.
    """

    def __init__(self, package: str, load: Callable[[], Callable[Arguments, Result]], failure: str) -> None:
        self.package, self.load, self.failure = package, load, failure
        self.given_up = False
        self._solver: Callable[Arguments, Result] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | None:
        """Return what the solver returns, or None if it does not work here."""
        if self.given_up:
            return None
        try:
            if self._solver is None:
                self._solver = self.load()
            return self._solver(*args, **kwargs)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # packages, drivers, compilers and disks fail in every possible way
            self.given_up = True
            if not (isinstance(error, ModuleNotFoundError) and error.name == self.package):
                warnings.warn(f"{self.failure}. The reason: {error!r}", stacklevel=2)
            return None
