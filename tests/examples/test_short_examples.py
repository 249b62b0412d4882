"""The shortest examples run as they stand, and the table of the examples names them all."""

import re
from pathlib import Path

import pytest
import torch
from scripts import EXAMPLES, run_example
from torch import nn

import sfr

LONGEST = {
    "two_lines.py": 39,
    "accelerate_loop.py": 40,
    "past_predictions.py": 41,
    "detector.py": 46,
    "torchrun_ddp.py": 41,
    "hf_trainer.py": 41,
    "lightning_module.py": 41,
    "compare.py": 148,
}


@pytest.mark.parametrize("name", LONGEST)
def test_it_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= LONGEST[name]


def test_the_training_of_train_cifar_is_read_in_one_place():
    text = (EXAMPLES / "train_cifar.py").read_text()
    loop = re.search(r"^def train\(.*?(?=^@|^def )", text, flags=re.DOTALL | re.MULTILINE)[0]
    assert len(loop.strip().splitlines()) <= 60
    for step in ("criterion(model(images), labels", "backward(loss)", "optimizer.step()", "optimizer.zero_grad()"):
        assert step in loop


def test_the_table_names_every_example_and_its_command():
    table = (EXAMPLES / "README.md").read_text()
    for script in EXAMPLES.glob("*.py"):
        if script.name != "__init__.py":
            assert f"[{script.name}]({script.name})" in table
            assert f"examples/{script.name}" in table
    assert all((EXAMPLES / name).exists() for name in re.findall(r"\(([\w./-]+\.py)\)", table))


def test_two_lines_trains_to_a_good_accuracy(tmp_path, capsys):
    names = run_example("two_lines.py", tmp_path)
    assert names["accuracy"] > 0.8
    assert "test accuracy" in capsys.readouterr().out
    assert isinstance(names["model"], nn.Sequential)
    assert not isinstance(names["model"], sfr.SFRWrapper)


def test_the_loop_of_accelerate_trains_with_the_feature_term(tmp_path, capsys):
    names = run_example("accelerate_loop.py", tmp_path)
    assert names["criterion"].last.feature > 0
    assert names["criterion"].step == 3 * len(names["loader"])
    assert names["plain"] is names["net"]
    accuracy = float(capsys.readouterr().out.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 40


def test_past_predictions_are_kept_of_every_image(tmp_path):
    names = run_example("past_predictions.py", tmp_path)
    table = names["criterion"].labels.past.table
    assert table.shape == (1440, 10)
    assert (table.sum(dim=1) > 0.99).all()
    assert names["criterion"].labels.current_alpha() == pytest.approx(0.8)
    assert names["accuracy"] > 0.3


def test_a_detector_trains_with_its_own_losses_and_the_feature_term(tmp_path: Path, capsys):
    names = run_example("detector.py", tmp_path, "--steps", "2", "--size", "64")
    last = names["criterion"].last
    assert len(last.pairs) == 3
    assert last.feature > 0
    torch.testing.assert_close(names["loss"].detach(), last.label + last.weight * last.feature)
    assert capsys.readouterr().out.count("step ") == 2
    assert not isinstance(names["detector"], sfr.SFRWrapper)
