"""The first command compares sfr with plain training in pairs, prints every seed, and draws what it prints."""

import subprocess
import sys

import compare
import numpy as np
import pytest
import torch
from cifar_metrics import classification_scores


def test_the_command_prints_every_seed_and_the_paired_difference_and_draws_it(tmp_path, examples, environment):
    small = ["--labels", "3", "--wrong", "0.2", "--epochs", "2", "--seeds", "3", "5"]
    done = subprocess.run(
        [sys.executable, examples / "compare.py", *small],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout
    assert printed.startswith("30 labelled digits, 20% of the labels wrong, 2 epochs")
    rows = {
        line[:16].strip(): [float(x) for x in line[16:].split()]
        for line in printed.splitlines()
        if "seed " in line and "," in line and "mean" not in line
    }
    assert list(rows) == ["seed 3, plain", "seed 3, with sfr", "seed 5, plain", "seed 5, with sfr"]
    difference = np.mean(
        [np.subtract(rows[f"seed {seed}, with sfr"], rows[f"seed {seed}, plain"]) for seed in (3, 5)], axis=0
    )
    last = next(line for line in printed.splitlines() if line.startswith("difference"))
    assert [float(cell.split(" ± ")[0]) for cell in last.split("  ") if "±" in cell] == pytest.approx(
        difference, abs=2e-3
    )
    assert printed.splitlines()[-1] == "picture: runs/compare.png"
    assert (tmp_path / "runs/compare.png").read_bytes().startswith(b"\x89PNG")


def test_standard_errors_are_those_of_the_pairs():
    results = torch.tensor([[[80.0, 5, 1], [82, 4, 1]], [[90, 5, 1], [94, 2, 1]]])
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


def test_both_trainings_of_a_seed_differ_in_the_two_lines_only(monkeypatch):
    """With the switches off, sfr ends with the weights of the plain training."""
    images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    plain = compare.trained(images, labels, 2, seed=3, with_sfr=False)
    wrapper = compare.sfr.SFRWrapper
    with_sfr = compare.trained(images, labels, 2, seed=3, with_sfr=True)
    monkeypatch.setattr(compare.sfr, "SFRWrapper", lambda model: wrapper(model, weight=0, smoothing="none"))
    switched_off = compare.trained(images, labels, 2, seed=3, with_sfr=True)
    assert torch.equal(switched_off[0].weight, plain[0].weight)
    assert not torch.equal(with_sfr[0].weight, plain[0].weight)


def test_labels_are_as_few_and_as_wrong_as_asked_and_the_same_for_both():
    labels = torch.arange(400) % 10
    train, given = compare.few_labels(labels, 10, 0.1, seed=4)
    assert torch.equal(torch.bincount(labels[train]), torch.full((10,), 10))
    assert len(train.unique()) == 100
    assert (given != labels[train]).sum() == 10
    again = compare.few_labels(labels, 10, 0.1, seed=4)
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], given)


def test_the_example_is_short(examples):
    assert len((examples / "compare.py").read_text().splitlines()) <= 130
