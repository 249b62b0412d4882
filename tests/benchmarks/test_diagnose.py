import json

import pytest
import torch

from benchmarks.accuracy import diagnose
from benchmarks.accuracy.cell import Cell, Schedule
from benchmarks.accuracy.diagnosis_tables import diagnosis_tables
from benchmarks.accuracy.training import CellRun
from benchmarks.common.data import Parts
from examples.common.data import Labelled

TINY = Schedule(epochs=1, batch_size=8, per_class=2, image_size=16)


def tiny_run(arm):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(4)
    data = Labelled(torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8), labels)
    return CellRun(Cell(arm, 0, "held-out", "tiny", "resnet8", "cifar10"), TINY, Parts(data, data), torch.device("cpu"))


def test_a_permuted_map_costs_nothing_after_matching_and_all_its_mass_moves():
    nodes = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    facts = diagnose.plan_facts(nodes, nodes.roll(1, dims=1))
    assert facts["emd"] == pytest.approx(0, abs=1e-6)
    assert facts["in_place"] == 0
    assert facts["aligned"] == pytest.approx((nodes - nodes.roll(1, dims=1)).square().mean().item())
    apart = nodes[:, :, None] - nodes[:, None, :]
    assert facts["independent"] == pytest.approx(apart.square().mean().item())


def test_an_equal_map_stays_in_place():
    nodes = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    assert diagnose.plan_facts(nodes, nodes)["in_place"] == pytest.approx(1)


def test_gradient_norm_is_that_of_the_stage():
    stage = torch.nn.Linear(2, 1)
    loss = stage(torch.tensor([[3.0, 4.0]])).sum()
    assert diagnose.gradient_norm(loss, stage) == pytest.approx((9 + 16 + 1) ** 0.5)


def test_looking_into_a_run_does_not_change_it():
    run = tiny_run("sfr@smoothing=none")
    run.train_epoch()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    finding = diagnose.looked_into(run, run.arm, torch.arange(8), 0.2)
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert list(finding["pairs"]) == ["layer1 <- layer2", "layer1 <- layer3", "layer2 <- layer3"]
    assert finding["stages"]["layer3"]["feature_gradient"] == 0  # it only supervises
    assert min(finding["stages"][name]["feature_gradient"] for name in ("layer1", "layer2")) > 0


def test_the_feature_gradient_grows_with_the_weight():
    run = tiny_run("sfr@smoothing=none")
    run.train_epoch()
    light, heavy = (diagnose.looked_into(run, run.arm, torch.arange(8), weight) for weight in (0.1, 0.3))
    for name in ("layer1", "layer2"):
        ratio = heavy["stages"][name]["feature_gradient"] / light["stages"][name]["feature_gradient"]
        assert ratio == pytest.approx(3, rel=1e-3)


def test_tables_show_shares_of_what_was_found(tmp_path):
    pair = {"emd": 0.5, "aligned": 0.9, "independent": 1.0, "in_place": 0.0625}
    shallow = {"rms": 1.234, "label_gradient": 2.0, "feature_gradient": 0.1}
    deep = {"rms": 2.0, "label_gradient": 1.0, "feature_gradient": 0.0}
    record = {
        "cell": {"arm": "sfr", "seed": 7, "schedule": "tiny", "model": "resnet8", "dataset": "cifar10"},
        "weight": 0.2,
        "findings": [{"epoch": 10, "pairs": {"a <- b": pair}, "stages": {"a": shallow, "b": deep}}],
    }
    (tmp_path / "diagnosis-x.json").write_text(json.dumps(record))
    head, table = diagnosis_tables(tmp_path)
    assert "Inside the feature term" in head
    assert table.splitlines()[-1] == "| 10 | 50% | 6% | 1.23 | 2.00 | 5% |"
    assert diagnosis_tables(tmp_path / "empty") == []
