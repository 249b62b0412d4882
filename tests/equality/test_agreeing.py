"""Ranks whose first forwards skip different blocks end with the same stages, and none waits for another."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("agreeing_ranks.py")


def found(folder, kind):
    subprocess.run([sys.executable, str(SCRIPT), str(folder), kind], check=True, timeout=300)
    return [json.loads((folder / f"found-{rank}").read_text()) for rank in range(3)]


def test_ranks_that_drop_other_layers_find_the_same_stages_and_train_them(tmp_path):
    first, *others = found(tmp_path, "trained")
    for (stages, _), (same, pairs) in (first[:2], first[2:]):
        assert stages == same
        assert len(stages) == 4
        assert pairs == 6
    for other in others:
        assert [stages for stages, _ in other] == [stages for stages, _ in first]


def test_a_rank_that_alone_watches_a_forward_does_not_wait(tmp_path):
    assert [len(steps) for steps in found(tmp_path, "alone")] == [0, 1, 0]


def test_the_stages_of_a_report_on_one_rank_are_those_of_all(tmp_path):
    (first,), (second,), (third,) = found(tmp_path, "reported on one")
    assert first[0] == second[0] == third[0]
