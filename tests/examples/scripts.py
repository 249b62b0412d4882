"""Run an example as a script, in this process."""

import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run an example in an empty folder, as `python examples/NAME` does; return its global names."""
    script = EXAMPLES / name
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of themselves and of each other
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *arguments])
        return runpy.run_path(str(script), run_name="__main__")
