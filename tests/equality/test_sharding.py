"""DDP = FSDP2 (``fully_shard`` of the wrapped model): two processes, the parameters sharded between them."""

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

NO_CPU_STREAM = "PyTorch before 2.7 cannot run FSDP2 on the CPU: https://github.com/pytorch/pytorch/pull/145935"

pytestmark = pytest.mark.xfail(
    torch.__version__.startswith("2.6."), raises=ProcessRaisedException, strict=True, reason=NO_CPU_STREAM
)


@pytest.mark.parametrize("what", ["losses", "features", "gradients", "weights", "distributions", "counts"])
def test_sharded_parameters_change_nothing(trained, assert_equal, what):
    for sharded, whole in zip(trained("2-fsdp2"), trained("2-plain"), strict=True):
        assert_equal(sharded[what], whole[what], rtol=1e-4, atol=1e-5)


def test_the_model_was_really_sharded(trained):
    assert {result["model"] for result in trained("2-fsdp2")} == {"FSDPSequential"}
