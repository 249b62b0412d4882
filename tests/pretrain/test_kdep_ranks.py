"""Two ranks on halves of the batches equal one rank on the whole: alignment, loss, gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("kdep_ranks.py")


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


@pytest.mark.parametrize("what", ["alignment", "loss", "gradient"])
def test_two_ranks_equal_one(results, what):
    (one,), (first, second) = results
    assert (first["ranks"], second["ranks"]) == (2, 2)
    torch.testing.assert_close(first[what], one[what], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second[what], first[what], rtol=0, atol=0)
