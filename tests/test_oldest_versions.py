"""The versions that CI tests as the oldest are the lower bounds that pyproject.toml states."""

import re
import sys
from pathlib import Path

from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# What checks, packs and describes the code, not what it runs with.
TOOLS = {"ruff", "mypy", "build", "mkdocs-material", "mkdocstrings[python]"}


def test_ci_tests_with_the_lower_bound_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    bounds: dict[str, Version] = {}
    for requirement in stated:
        if not requirement.startswith("sfr["):
            name, bound = requirement.split(">=")
            bounds[name] = max(Version(bound), bounds.get(name, Version("0")))
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE)
    assert {name: Version(pin) for name, pin in pins} == {name: bounds[name] for name in bounds.keys() - TOOLS}
