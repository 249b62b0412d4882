"""One process = N processes under Accelerate's DDP on the same global batches, also with accumulation and bfloat16."""

import pytest
import torch

RESULTS = ["losses", "gradients", "weights", "distributions", "counts"]
STATE = ["weights", "distributions", "counts"]


@pytest.mark.parametrize("what", RESULTS)
@pytest.mark.parametrize("job", ["2-plain", "4-plain", "2-accumulated", "4-accumulated"])
def test_processes_equal_one(trained, assert_equal, job, what):
    (one,) = trained("1-" + job[2:])
    assert_equal(trained(job)[0][what], one[what], rtol=1e-4, atol=1e-5)
    if what == "counts":
        assert one["counts"].sum() > 0


@pytest.mark.parametrize("what", ["losses", "weights", "distributions", "counts"])
def test_processes_equal_one_in_bfloat16_up_to_its_rounding(trained, assert_equal, what):
    assert_equal(trained("2-bf16")[0][what], trained("1-bf16")[0][what], rtol=0.01, atol=0.002)


@pytest.mark.parametrize("what", STATE)
@pytest.mark.parametrize("job", ["2-plain", "4-plain", "4-accumulated"])
def test_all_ranks_hold_the_same_state(trained, assert_equal, job, what):
    first, *others = trained(job)
    for other in others:
        assert_equal(other[what], first[what])


@pytest.mark.parametrize("job", ["2-plain", "4-plain"])
def test_the_processes_were_really_parallel(trained, job):
    results = trained(job)
    assert [result["ranks"] for result in results] == [len(results)] * len(results)
    assert {result["model"] for result in results} == {"DistributedDataParallel"}
    assert len({result["features"].item() for result in results}) == len(results)  # each of its own share


def test_accumulation_really_skipped_the_exchange_of_gradients(trained):
    first, second = (result["first gradients"][0] for result in trained("2-accumulated"))
    assert not torch.equal(first, second)
    first, second = (result["first gradients"][0] for result in trained("2-plain"))
    assert torch.equal(first, second)
