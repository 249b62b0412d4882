"""The notebook of the first steps runs from top to bottom, as a kernel would run it, and is committed with results."""

import ast
import json
from pathlib import Path

import matplotlib as mpl
import pytest

import sfr

mpl.use("Agg")

NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "first_steps.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(cell, names):
    """Run the code of a cell and return the value of its last expression, if it ends with one."""
    body = ast.parse(cell).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


@pytest.fixture(scope="module")
def results():
    """The names that the notebook leaves, and the value of each cell."""
    names = {"__name__": "__main__"}
    values = [run(cell, names) for cell in CELLS]
    return names, values


def test_it_learns_and_ends_with_the_plain_model(results):
    names, values = results
    assert all(value > 0.5 for value in values if isinstance(value, float))  # one in ten would be chance
    assert not isinstance(names["model"], sfr.SFRWrapper)
    assert values[-1] is True


def test_it_draws_a_plan(results):
    names, _ = results
    assert names["axes"].get_title() == "2 <- 8"
    assert names["axes"].texts


def test_it_is_committed_with_the_results_of_a_run():
    counts = [cell["execution_count"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CELLS) + 1))
