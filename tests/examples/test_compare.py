"""The first command compares sfr with plain training in pairs, prints every seed, and draws what it prints."""

import numpy as np
import pytest
import torch
from scripts import run_example

import compare
from common.scores import classification_scores


def test_the_command_prints_every_seed_and_the_paired_difference_and_draws_it(tmp_path, capfd):
    run_example("compare.py", tmp_path, "--labels", "3", "--wrong", "0.2", "--epochs", "2", "--seeds", "3", "5")
    printed, complaints = capfd.readouterr()
    assert complaints == ""
    assert printed.startswith("30 labelled digits, 20% of the labels wrong, 2 epochs")
    rows = {line[:24].strip(): line[24:].split("  ") for line in printed.splitlines()}
    scores = {name: [float(cell) for cell in cells if cell] for name, cells in rows.items() if name.startswith("seed ")}
    assert list(scores) == [f"seed {seed}, {name}" for seed in (3, 5) for name in compare.METHODS]
    for name in ("two lines", "class means", "early learning"):
        pairs = [np.subtract(scores[f"seed {seed}, {name}"], scores[f"seed {seed}, plain"]) for seed in (3, 5)]
        means = [float(cell.split(" ± ")[0]) for cell in rows[f"{name} - plain"] if cell]
        assert means == pytest.approx(np.mean(pairs, axis=0), abs=2e-3)
    assert printed.splitlines()[-1] == "picture: runs/compare.png"
    assert (tmp_path / "runs/compare.png").read_bytes().startswith(b"\x89PNG")


def test_one_more_method_can_be_given(tmp_path, capfd):
    switches = ["--sfr", "smoothing=uniform", "alpha=0.2"]
    run_example("compare.py", tmp_path, "--labels", "3", "--epochs", "1", "--seeds", "3", "5", *switches)
    assert "as given - plain" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("--labels", "1000", "from 1 to 170"), ("--labels", "0", "from 1 to 170"), ("--epochs", "0", "at least 1")],
)
def test_what_leaves_nothing_to_train_or_to_test_is_an_error(tmp_path, capfd, option, value, allowed):
    with pytest.raises(SystemExit):
        run_example("compare.py", tmp_path, option, value)
    assert f"argument {option}: must be {allowed}, got {value}" in capfd.readouterr().err


def test_standard_errors_are_those_of_the_pairs():
    plain, gains = [[80.0, 5, 1], [90, 5, 1]], [[82.0, 4, 1], [94, 2, 1]]
    results = torch.tensor([[plain[i], gains[i], plain[i], plain[i]] for i in range(2)])
    assert "+3.000 ± 1.000" in compare.table(results)
    assert "-2.000 ± 1.000" in compare.table(results)
    assert "85.000 ± 5.000" in compare.table(results)


def test_scores_are_those_of_the_metric_of_the_other_examples():
    logits, labels = 3 * torch.randn(200, 10), torch.randint(0, 10, (200,))
    accuracy, calibration, loss = compare.scores(logits, labels).tolist()
    metric = classification_scores(logits.double().numpy(), labels.numpy())
    assert [accuracy / 100, calibration / 100, loss] == pytest.approx(
        [metric["accuracy"], metric["ece"], metric["loss"]], rel=1e-4
    )


def test_the_trainings_of_a_seed_differ_in_the_two_lines_only():
    """With the switches off, sfr ends with the weights of the plain training."""
    images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    off = {"feature_weight": 0.0}
    plain, switched_off, two_lines = (compare.trained(images, labels, 2, 3, how)[0].weight for how in (None, off, {}))
    assert torch.equal(switched_off, plain)
    assert not torch.equal(two_lines, plain)


def test_labels_are_as_few_and_as_wrong_as_asked_and_the_same_every_time():
    labels = torch.arange(400) % 10
    train, given = compare.few_labels(labels, 10, 0.1, seed=4)
    assert torch.equal(torch.bincount(labels[train]), torch.full((10,), 10))
    assert len(train.unique()) == 100
    assert (given != labels[train]).sum() == 10
    again = compare.few_labels(labels, 10, 0.1, seed=4)
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], given)
