"""The net, the comparison that notes its tolerance, and the runs of several processes."""

import functools
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from group_norm import group_norm_net  # noqa: E402
from processes import run_ranks  # noqa: E402
from ranks import train  # noqa: E402


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
def trained():
    """Return a function that gives the results of a job, one for each rank, and runs it when it is first asked for.

    A job is RANKS-KIND, as in ``2-accumulated``; the kinds are those of :func:`ranks.train`.
    """

    @functools.cache
    def results(job):
        ranks, kind = job.split("-")
        return run_ranks(train, int(ranks), kind, ranks=int(ranks))

    return results
