"""One process = N processes on the same global batches: loss, gradients, weights and label statistics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")


def run(folder, ranks):
    file = folder / f"of{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, str(SCRIPT), str(file)], check=True, env=environment, timeout=300)
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run(folder, 1), run(folder, 2)


def test_two_processes_were_really_started(results):
    assert [result["ranks"] for result in results[1]] == [2, 2]


@pytest.mark.parametrize("what", ["losses", "gradients", "weights", "distributions", "counts"])
def test_two_processes_equal_one(results, what):
    (one,), (two, _) = results
    torch.testing.assert_close(two[what], one[what], rtol=1e-4, atol=1e-5)
    if what == "counts":
        assert one["counts"].sum() > 0


@pytest.mark.parametrize("what", ["weights", "distributions", "counts"])
def test_both_ranks_hold_the_same_bits(results, what):
    _, (first, second) = results
    torch.testing.assert_close(first[what], second[what], rtol=0, atol=0)
