"""The equality matrix: runs tests/equality and writes what was compared, how closely and with what outcome.

python -m benchmarks.equality        # writes docs/equality.md
"""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from benchmarks.common.paths import DOCS, ROOT
from benchmarks.common.tables import markdown_table

HEAD = """# Equality matrix

What must not change the training, and does not. Written by `python -m benchmarks.equality`, which runs
`tests/equality` on a small convolutional net with group normalisation; the tolerance is the one the test asserts.

"""


def main() -> int:
    """Run the tests, write the page and return the exit status of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = f"-p no:cacheprovider -o junit_family=xunit1 --junitxml={report} tests/equality"
        status = subprocess.run([sys.executable, "-m", "pytest", *arguments.split()], cwd=ROOT, check=False).returncode
        cases = list(ET.parse(report).iter("testcase"))
    (DOCS / "equality.md").write_text(HEAD + "\n\n".join(sections(cases)) + "\n\n" + environment() + "\n")
    return status


def sections(cases: list[ET.Element]) -> list[str]:
    """Return a table for each axis, which is a test file; it has a row for each test, all its parameters together."""
    axes: dict[str, dict[str, list[ET.Element]]] = {}
    for case in cases:
        test = case.attrib["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        axes.setdefault(case.attrib["classname"], {}).setdefault(test, []).append(case)
    heads = ["test", "tolerance", "outcome"]
    return [
        f"## {title(file)}\n\n"
        + markdown_table(heads, ([name, tolerances(group), outcomes(group)] for name, group in tests.items()))
        for file, tests in sorted(axes.items())
    ]


def title(file: str) -> str:
    """Return the docstring of a test file, given by its dotted name."""
    source = (ROOT / file.replace(".", "/")).with_suffix(".py").read_text()
    return (ast.get_docstring(ast.parse(source)) or file).rstrip(".")


def tolerances(group: list[ET.Element]) -> str:
    """Return the tolerances that the cases of a test noted."""
    return "; ".join(sorted({noted.attrib["value"] for case in group for noted in case.iter("property")}))


def outcomes(group: list[ET.Element]) -> str:
    """Return how many cases of a test passed, failed, or failed as expected, and why."""
    return "; ".join(f"{count} {outcome}" for outcome, count in Counter(map(outcome_of, group)).items())


def outcome_of(case: ET.Element) -> str:
    """Return "passed", "**failed**", or the reason of a skip or an expected failure."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "**failed**"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    kind = "failed as expected" if skipped.attrib.get("type") == "pytest.xfail" else "skipped"
    return f"{kind}: {skipped.attrib.get('message', '')}"


def environment() -> str:
    """Return the versions that the tests ran with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "numpy"))
    return f"Python {platform.python_version()}, {packages}, on the CPU ({platform.machine()})."


if __name__ == "__main__":
    sys.exit(main())
