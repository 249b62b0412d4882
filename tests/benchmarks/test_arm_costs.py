"""Costs of the arms: of the whole training, against vanilla's, with what an arm keeps between steps."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.cell import Cell, Schedule
from benchmarks.accuracy.groups import Group
from benchmarks.accuracy.training import CellRun
from benchmarks.step_cost import arm_costs
from sfr.preflight.cost import StepCost

SCHEDULE = Schedule(
    epochs=10, batch_size=8, image_size=16, per_class=4, precision="fp32"
)  # 400 images: 50 steps an epoch


@pytest.fixture
def run_of():
    def build(arm: str) -> CellRun:
        cell = Cell(arm, 0, "test", "small", "resnet8")
        return CellRun(cell, SCHEDULE, arm_costs.random_parts(100, 4), torch.device("cpu"))

    return build


@pytest.fixture
def _fixed_times(monkeypatch):
    """Vanilla's step takes a second, sfr's two; between epochs sfr takes ten."""

    def compare(steps, *_, **__):
        for step in steps.values():
            step()
        return {arm: StepCost((0.0, 2.0, 9.0) if arm == "sfr" else (1.0,), 10**6) for arm in steps}

    monkeypatch.setattr(arm_costs, "compare_steps", compare)
    monkeypatch.setattr(arm_costs, "seconds_between_epochs", lambda run: 10.0 * (run.cell.arm == "sfr"))


def test_by_default_all_arms_of_the_tables_are_measured_and_those_with_cells_of_such_images():
    def group(arm: str, image_size: int) -> Group:
        cell = {"arm": arm, "seed": 0, "model": "resnet20", "dataset": "cifar100"}
        return Group([{"cell": cell, "schedule": {"image_size": image_size}}], {})

    groups = [group("sfr@weight=7", 16), group("sfr@weight=8", 32), group("vanilla", 16)]
    arms = arm_costs.compared_arms(groups, "resnet20", "cifar100", 16)
    assert {"vanilla", "byot", "sfr", "sfr@weight=7", "vanilla-longer@factor=1.1"} <= set(arms)
    assert not {"sfr@weight=8", "vanilla-longer@factor=1.02"} & set(arms)
    assert len(arms) == len(set(arms))
    assert "sfr@weight=7" not in arm_costs.compared_arms(groups, "resnet18", "cifar100", 16)


@pytest.mark.usefixtures("_fixed_times")
def test_time_is_that_of_all_steps_and_of_what_is_between_epochs(run_of):
    costs = arm_costs.measure({arm: run_of(arm) for arm in ("vanilla", "sfr")}, repeats=1, train_steps=1)
    assert costs["vanilla"]["training_seconds"] == 10 * 50
    assert costs["sfr"]["training_seconds"] == 10 * (50 * 2 + 10)
    assert costs["sfr"]["time_ratio"] == 1100 / 500
    assert costs["vanilla"]["time_ratio"] == costs["vanilla"]["memory_ratio"] == 1


@pytest.mark.usefixtures("_fixed_times")
def test_an_arm_that_trains_longer_pays_for_its_epochs(run_of):
    runs = {arm: run_of(arm) for arm in ("vanilla", "label-smoothing")}
    runs["label-smoothing"].epochs = 13
    assert arm_costs.measure(runs, repeats=1, train_steps=1)["label-smoothing"]["time_ratio"] == 1.3


@pytest.mark.usefixtures("_fixed_times")
def test_memory_includes_what_an_arm_keeps(run_of):
    runs = {arm: run_of(arm) for arm in ("vanilla", "label-smoothing")}
    runs["label-smoothing"].arm.register_buffer("memory", torch.zeros(10**6))
    costs = arm_costs.measure(runs, repeats=1, train_steps=1)
    weights = sum(parameter.nbytes for parameter in runs["vanilla"].arm.parameters())
    assert costs["vanilla"]["peak_bytes"] > 10**6 + 2 * weights  # and momentum
    assert costs["label-smoothing"]["peak_bytes"] == costs["vanilla"]["peak_bytes"] + 4 * 10**6


def test_all_arms_step_on_the_same_images_for_ever(run_of):
    seen: dict[str, list[torch.Tensor]] = {}
    for arm in ("vanilla", "sfr"):
        run, seen[arm] = run_of(arm), []
        run.step = seen[arm].append
        step = arm_costs.endless(run)
        for _ in range(51):
            step()
    assert torch.equal(torch.stack(seen["vanilla"]), torch.stack(seen["sfr"]))
    assert torch.equal(seen["sfr"][0], seen["sfr"][50])
    assert len(torch.cat(seen["sfr"][:50]).unique()) == 400


def test_real_steps_are_measured(run_of):
    costs = arm_costs.measure({arm: run_of(arm) for arm in ("vanilla", "sfr")}, repeats=3, train_steps=1)
    assert len(costs["sfr"]["all_step_seconds"]) == 3
    assert costs["sfr"]["memory_ratio"] > 1


def test_networks_compiled_in_one_process_as_on_a_gpu_train_like_plain_ones(run_of):
    arms, losses = ("vanilla", "byot", "tfd", "sfr", "sfr@weight=0"), []
    torch._dynamo.reset()
    with torch._dynamo.config.patch(arm_costs.COMPILER):
        for compiled in (False, True):
            torch.manual_seed(0)  # of the images
            runs = {arm: run_of(arm) for arm in arms}
            for run in runs.values():
                if compiled:
                    run.model.compile(backend="eager")
            steps = {arm: arm_costs.endless(run) for arm, run in runs.items()}
            losses.append({arm: [step().item() for _ in range(3)] for arm, step in steps.items()})
    assert losses[0] == losses[1]
