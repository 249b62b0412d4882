"""The benchmark of DoGo: what it runs, and its tables."""

from argparse import Namespace

import pytest

import pretrain_dogo
from benchmarks.pretrain import dogo


@pytest.fixture
def runs(monkeypatch):
    """The arguments of the example in each cell that is run; each run ends with an error, as nothing is trained."""
    called = []

    def stop(arguments, args):
        called.append(pretrain_dogo.parse_arguments(arguments))
        raise InterruptedError

    monkeypatch.setattr(dogo, "pretrain", stop)
    return called


@pytest.mark.parametrize(
    ("method", "expected"), [("alone", ("alone", 0.5)), ("colder", ("alone", 0.1)), ("together", ("dogo", 0.5))]
)
def test_a_cell_runs_the_example_with_what_its_name_says(runs, method, expected):
    args = Namespace(objective="simsiam", image_size=32, epochs=50)
    with pytest.raises(InterruptedError):
        dogo.run_cell(method, 2, None, args)
    (run,) = runs
    assert (run.method, run.temperature) == expected
    assert (run.objective, run.image_size, run.epochs, run.seed) == ("simsiam", 32, 50, 2)
    assert run.models == ["resnet8", "resnet20"]


def cell(method, seed, accuracy, recipe="--epochs 10"):
    scores = {model: dict.fromkeys(dogo.MEASURES, accuracy) for model in ("resnet8", "resnet20")}
    return {"method": method, "seed": seed, "recipe": recipe, "precision": "no", "scores": scores}


def test_methods_are_compared_within_a_recipe_and_a_seed():
    cells = [cell("alone", 0, 0.4), cell("alone", 1, 0.6), cell("colder", 1, 0.5), cell("together", 1, 0.75)]
    rows = [line for line in dogo.tables([*cells, cell("alone", 0, 0.1, "--epochs 50")]).splitlines() if "|" in line]
    assert rows[0] == "| accuracy, % | alone | colder | together | together against alone | together against colder |"
    assert rows[2].endswith("| 50.00 ± 14.14 | 50.00 | 75.00 | +15.00 (1 of 1) | +25.00 (1 of 1) |")
    assert rows[-1].endswith("| 10.00 |")
    assert len(rows) == 4 * 7
