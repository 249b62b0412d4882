"""Every command that a page, the GPU's script or CI names is one that the benchmarks take."""

import importlib
import os
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / ".ci/run",
]


def commands_in(text: str) -> list[str]:
    """Return the commands of benchmarks, as they are given to a shell, without what it does with their output."""
    found = re.findall(r"python (?:-m )?benchmarks[./][^`\n&|#<>)]*", text.replace("\\\n", " "))
    return [command.strip() for command in found]


WRITTEN = sorted({command for page in PAGES for command in commands_in(page.read_text())})


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, minus_m, module, *arguments = shlex.split(command)
    assert minus_m == "-m", command
    is_room = find_spec(module).submodule_search_locations is not None
    program = importlib.import_module(f"{module}.__main__" if is_room else module)
    monkeypatch.setattr("sys.argv", [module, *arguments])
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            program.parse_arguments()
    elif hasattr(program, "parse_arguments"):
        program.parse_arguments()
    else:
        assert not arguments
    assert callable(program.main)


@pytest.mark.parametrize("command", WRITTEN)
def test_a_written_command_is_taken(command, monkeypatch):
    check(command, monkeypatch)


def test_the_table_of_the_benchmarks_has_every_command_and_the_pages_it_names_are_there():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    named = {shlex.split(command)[2] for command in commands_in(table)}
    runnable = set()
    for file in (ROOT / "benchmarks").rglob("*.py"):
        if '__name__ == "__main__"' in file.read_text():
            runnable.add(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    assert named == runnable


@pytest.mark.parametrize("arguments", [[], ["--data-dir", "data"], ["--tiny", "--data-dir", "data"]], ids=str)
def test_the_script_of_the_gpu_runs_commands_that_there_are(tmp_path, monkeypatch, arguments):
    """A dry run: `python` is a program that notes how it was called."""
    calls = of_the_gpu(tmp_path, *arguments)
    tests, *calls = calls.splitlines()
    assert all((ROOT / each).exists() for each in tests.split() if each.startswith("tests/"))
    for call in calls:
        check(call, monkeypatch)
    assert len(calls) == (8 if arguments else 6)
    assert not arguments or ("--plan tiny" in calls[-1]) != (f"--data-dir {tmp_path}/data" in calls[-1])
    assert all(f"{tmp_path}/data" in call for call in calls if "accuracy " in call)


def test_the_script_of_the_gpu_keeps_what_is_done_and_ends_at_its_budget(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tests.xml").touch()
    (tmp_path / "results/step-large.json").touch()
    assert len(of_the_gpu(tmp_path).splitlines()) == 5
    assert of_the_gpu(tmp_path, "--minutes", "0") == ""


def of_the_gpu(folder, *arguments):
    """Return the calls of `python` that the script makes, in a folder that keeps its results."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    python, calls = folder / "bin" / "python", folder / "calls"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"python $*\" >> {calls}\n")
    python.chmod(0o755)
    calls.write_text("")
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "benchmarks/gpu.sh"), "--out", "results", *arguments]
    subprocess.run(script, cwd=folder, env=environment, check=True)
    return calls.read_text()
