"""The reference pages show what there is: every name can be imported, and its docstring describes its own arguments."""

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import sfr

ROOT = Path(__file__).parents[1]
SHOWN = sorted(
    {
        name
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    }
)


def imported(name):
    """The object of this full name; skips the test where a framework is missing or too old."""
    module, _, attribute = name.rpartition(".")
    if not hasattr(sys.modules.get(module), attribute):
        sys.modules.pop(module, None)  # older pytest leaves what it failed to import, looking for doctests
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if module.startswith("sfr.integrations") and not str(error.name).startswith("sfr"):
            pytest.skip(str(error))
        raise


def described(docstring):
    """The names that the section "Args" of a docstring describes."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", f"{inspect.cleandoc(docstring)}\n", flags=re.MULTILINE)
    entries = re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", section[1], flags=re.MULTILINE) if section else []
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")]


def functions_of(shown):
    """A function, or a class and its public methods, inherited ones too, with their docstrings."""
    if not inspect.isclass(shown):
        return [(shown, shown.__doc__)]
    maker = shown.__init__ if "__init__" in vars(shown) else shown.__new__
    own = {
        name: value for cls in shown.__mro__[::-1] if cls.__module__[:4] == "sfr." for name, value in vars(cls).items()
    }
    public = [name for name in own if not name.startswith("_") and name != "extra_repr"]
    methods = [getattr(shown, name) for name in public if inspect.isfunction(own[name])]
    return [(maker, shown.__doc__), *((method, method.__doc__) for method in methods)]


@pytest.mark.parametrize("name", SHOWN)
def test_docstrings_describe_the_arguments_that_there_are(name):
    for function, docstring in functions_of(imported(name)):
        assert docstring, function
        if docstring and described(docstring):
            parameters = inspect.signature(function).parameters
            unknown = [each for each in described(docstring) if each not in parameters]
            assert not unknown, (function, unknown)


def test_every_public_name_is_in_the_reference():
    assert {f"sfr.{name}" for name in sfr.__all__} - set(SHOWN) == {"sfr.plot", "sfr.transport"}
    for package in ("transport", "pretrain", "labels"):
        public = {f"sfr.{package}.{name}" for name in importlib.import_module(f"sfr.{package}").__all__}
        shown = {imported(name) for name in SHOWN if not name.startswith("sfr.integrations")}
        assert {imported(name) for name in public} <= shown


def test_every_integration_is_in_the_reference():
    modules = {module.name for module in pkgutil.iter_modules(importlib.import_module("sfr.integrations").__path__)}
    assert {name.split(".")[2] for name in SHOWN if name.startswith("sfr.integrations")} == modules
