"""The net, the comparison that notes its tolerance, and the runs of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
collect_ignore = [
    "ranks.py",
    "join_ranks.py",
    "agreeing_ranks.py",
]  # no doctests, and it would load Accelerate into the process of the tests

from group_norm import group_norm_net  # noqa: E402

JOBS = [
    "1-plain",
    "2-plain",
    "4-plain",
    "1-accumulated",
    "2-accumulated",
    "4-accumulated",
    "1-bf16",
    "2-bf16",
    "2-fsdp2",
]


@pytest.fixture
def make_net():
    return group_norm_net


@pytest.fixture
def assert_equal(record_property):
    """Return ``torch.testing.assert_close``, exact if not told otherwise, which notes the tolerance in the report."""

    def compare(actual, expected, *, rtol=0.0, atol=0.0):
        record_property("tolerance", f"rtol {rtol:g}, atol {atol:g}" if rtol or atol else "bit for bit")
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    return compare


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return a function that gives the results of a job of ranks.py, one for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(FOLDER / "ranks.py"), str(folder), *JOBS]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

    def results(job):
        error = folder / f"{job}.error"
        if error.exists():
            raise RuntimeError(error.read_text())
        return [torch.load(folder / f"{job}.{rank}", weights_only=True) for rank in range(int(job[0]))]

    return results
