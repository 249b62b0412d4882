"""Leaves out what lacks an optional dependency, runs Triton without a GPU, and spreads the tests over workers."""

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

OPTIONAL = {
    "numba": [
        "sfr/feature/cosine_kernel.py",
        "sfr/transport/assignment.py",
        "sfr/transport/numba_functions.py",
        "sfr/transport/semi_assignment.py",
    ],
    "triton": ["sfr/transport/fused.py", "sfr/feature/fused.py", "sfr/feature/kernels.py"],
}
collect_ignore = [path for package, paths in OPTIONAL.items() if not find_spec(package) for path in paths]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before Triton is imported


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, a worker that has run out of tests takes over half of another one's tests: a few take long.

    Each worker begins with tests that follow one another, so that what a module shares is mostly made once.
    """
    if config.getoption("dist") != "load":
        return None  # the user's choice
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
