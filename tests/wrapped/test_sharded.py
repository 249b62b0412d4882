"""FSDP2 knows the wrapped model: a ViT, whose root has parameters, trains, validates, saves and loads sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHARDED = ["wrapped, then sharded", "sharded, then wrapped"]
NO_CPU_STREAM = "PyTorch before 2.7 cannot run FSDP2 on the CPU: https://github.com/pytorch/pytorch/pull/145935"

pytestmark = pytest.mark.xfail(
    torch.__version__.startswith("2.6."), raises=RuntimeError, strict=True, reason=NO_CPU_STREAM
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("shard_ranks.py")
    command = [sys.executable, str(script), str(folder), "one process", *SHARDED]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

    def results(kind):
        error = folder / f"{kind}.error"
        if error.exists():
            raise RuntimeError(error.read_text())
        return [torch.load(folder / f"{kind}.{rank}", weights_only=True) for rank in range(1 + (kind in SHARDED))]

    return results


@pytest.mark.parametrize("kind", SHARDED)
def test_sharding_changes_neither_weights_nor_validation(ranks, kind):
    [whole], parts = ranks("one process"), ranks(kind)
    torch.testing.assert_close(parts[0]["weights"], whole["weights"], rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part["validation"], whole["validation"], rtol=1e-4, atol=1e-5)
    features = torch.stack([part["features"] for part in parts]).mean(0)
    torch.testing.assert_close(features, whole["features"], rtol=1e-4, atol=1e-5)
    assert (features > 0).all()


@pytest.mark.parametrize("kind", SHARDED)
def test_a_distributed_checkpoint_loads_into_a_fresh_model(ranks, kind):
    for part in ranks(kind):
        torch.testing.assert_close(part["loaded"], part["validation"])


@pytest.mark.parametrize("kind", SHARDED)
def test_names_in_the_state_are_those_of_the_plain_model(ranks, kind):
    [whole] = ranks("one process")
    for part in ranks(kind):
        assert part["names"] == list(whole["weights"])


@pytest.mark.parametrize("kind", SHARDED)
def test_the_model_can_be_unwrapped_while_sharded(ranks, kind):
    for part in ranks(kind):
        assert part["kind"] == ["FSDPVisionTransformer", False]
        torch.testing.assert_close(part["unwrapped"], part["validation"])
