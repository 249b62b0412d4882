"""Different numbers of batches inside ``join()`` of DDP: it trains, or all ranks raise before they exchange."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("join_ranks.py")


def outcomes(folder: Path, options: dict[str, object]) -> list[str]:
    subprocess.run([sys.executable, str(SCRIPT), str(folder), json.dumps(options)], check=True, timeout=300)
    return [(folder / f"outcome-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "options",
    [{"smoothing": "class_mean"}, {"smoothing": "past", "num_samples": 4}],
    ids=["class means", "past"],
)
def test_what_ranks_exchange_is_an_error_on_each_of_them_before_the_first_step(tmp_path, options):
    for outcome in outcomes(tmp_path, options):
        assert outcome.startswith("0 with model.join(), a rank that has run out of batches takes no part")


@pytest.mark.parametrize("options", [{"smoothing": "none"}, {"smoothing": "uniform"}], ids=["none", "uniform"])
def test_where_nothing_is_exchanged_all_ranks_train(tmp_path, options):
    assert outcomes(tmp_path, options) == ["trained 2", "trained 3"]


def test_after_the_end_of_join_the_ranks_train_and_inside_the_next_one_it_is_an_error_again(tmp_path):
    for outcome in outcomes(tmp_path, {"smoothing": "class_mean", "after": True}):
        assert outcome.startswith("trained 2, then with model.join(), a rank that has run out of batches")
