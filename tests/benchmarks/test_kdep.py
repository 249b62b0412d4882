"""The benchmark of KDEP: every arm, in miniature."""

import json

import pytest
import torch
from torch import nn

from benchmarks.pretrain import kdep, kdep_cells
from examples.common.data import Labelled


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    small = {"pretrain_images": 12, "batch_size": 4, "labels_per_class": {"cifar10": 1, "flowers": 1}}
    for name, value in (small | {"finetune_steps": 2, "finetune_batch_size": 4}).items():
        monkeypatch.setitem(kdep_cells.SETTINGS, name, value)


def images(count, classes, size=32):
    return Labelled(torch.randint(256, (count, 3, size, size), dtype=torch.uint8), torch.arange(count) % classes)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Twelve images, and what a small network that stands for the teacher says of them."""
    teacher = nn.Sequential(
        nn.Conv2d(3, 80, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 1000)
    )
    monkeypatch.setattr(kdep_cells, "packaged_network", lambda name: teacher)
    return kdep_cells.unlabelled(images(12, 100), tmp_path / "outputs.pt")


def test_the_teacher_says_of_a_mirrored_image_what_it_says_of_the_mirror_view(given, tmp_path):
    assert given.images.pixels.shape == (12, 3, 16, 16)
    assert (given.features.shape, given.logits.shape) == ((2, 12, 80), (2, 12, 1000))
    first = images(12, 100)
    mirrored = Labelled(first.pixels.flip(3), first.labels)
    own, other = (
        kdep_cells.unlabelled(each, tmp_path / f"{name}.pt") for name, each in (("own", first), ("other", mirrored))
    )
    torch.testing.assert_close(own.features[0], other.features[1], rtol=1e-2, atol=1e-2)
    assert not torch.allclose(own.features[0], other.features[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("arm", kdep.ARMS)
def test_every_arm_trains_and_is_judged_on_every_data_set(given, arm):
    transfer = {"cifar10": (images(20, 10), images(20, 10)), "flowers": (images(10, 5, 64), images(10, 5, 64))}
    record = json.loads(json.dumps(kdep_cells.run_cell(arm, 5, 0, given, transfer)))
    assert set(record["accuracy"]) == {"cifar10", "flowers"}
    assert all(0 <= value <= 1 for value in record["accuracy"].values())
    assert record["steps"] == (0 if arm == "scratch" else 5)
    assert len(record["pretrain_losses"]) == (0 if arm == "scratch" else 5)


def test_arms_of_a_seed_begin_with_the_same_weights_and_see_the_same_labels(given, monkeypatch):
    seen = []
    monkeypatch.setattr(kdep_cells, "finetuned", lambda student, *rest: seen.append(student.conv1.weight.clone()) or 0)
    monkeypatch.setattr(kdep_cells, "pretrain", lambda *_: [])
    for arm in ("scratch", "svd", "logits"):
        kdep_cells.run_cell(arm, 5, 3, given, {"cifar10": (None, None)})
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_page_compares_arms_of_the_same_steps_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(kdep, "CELLS", tmp_path)
    monkeypatch.setattr(kdep, "PAGE", tmp_path / "page.md")
    kdep.PAGE.write_text(f"Words.\n\n{kdep.MARKER}\n\nold\n")
    for arm, steps, seed, value in [("scratch", 0, 0, 0.3), ("svd", 10, 0, 0.4), ("svd_pts", 10, 0, 0.5)]:
        accuracy = {"cifar10": value, "flowers": value / 2}
        record = {"arm": arm, "steps": steps, "seed": seed, "accuracy": accuracy}
        kdep.result_file(arm, steps, seed).write_text(json.dumps(record))
    text = kdep.page(kdep.load_results())
    assert text.startswith("Words.")
    assert "old" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["arm", "cifar10, 10 steps", "flowers, 10 steps"] in rows
    assert ["scratch", "30.00 (1)", "15.00 (1)"] in rows
    assert ["svd_pts > svd", "+10.00", "+5.00"] in rows
    assert ["svd > conv1x1", "", ""] in rows
