"""The shortest example runs as it stands."""

import subprocess
import sys


def test_two_lines_trains_to_a_good_accuracy(examples, environment, tmp_path):
    done = subprocess.run(
        [sys.executable, examples / "two_lines.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 80


def test_two_lines_is_short(examples):
    assert len((examples / "two_lines.py").read_text().splitlines()) < 40
