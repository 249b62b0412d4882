"""Extension of griffe: the docstrings, which help() shows as plain text, as Markdown for the reference pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|obj):`~?([\w.]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
MATH = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +.*| *(?=\n)))*)", flags=re.MULTILINE)
ALIASES = {"Example:": "Examples:", "See also:": "See Also:"}


class Markdown(griffe.Extension):
    """Turns what Markdown does not know into what it knows: roles into links, and formulas into displayed ones."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Show the arguments of ``__new__`` for a class that has no ``__init__``."""
        maker = cls.members.get("__new__")
        if isinstance(maker, griffe.Function) and "__init__" not in cls.members:
            init = griffe.Function("__init__", parameters=maker.parameters, lineno=maker.lineno, parent=cls)
            cls.set_member("__init__", init)


def as_markdown(text: str, obj: griffe.Object) -> str:
    """Return a docstring as Markdown.

    Args:
        text: the docstring.
        obj: what it belongs to; its scope resolves the names of roles.
    """
    for name, alias in ALIASES.items():
        text = re.sub(rf"^{name}$", alias, text, flags=re.MULTILINE)
    text = MATH.sub(lambda math: f"{math[1]}$$\n{_flush(math[1], math[2])}\n{math[1]}$$\n", text)
    text = INLINE_MATH.sub(lambda math: f"${math[1]}$", text)
    return ROLE.sub(lambda role: f"[`{role[1]}`][{_full_name(role[1], obj)}]", text)


def _flush(indent: str, formula: str) -> str:
    return "\n".join(indent + line.strip() for line in formula.strip().splitlines())


def _full_name(name: str, obj: griffe.Object) -> str:
    """Return the name under which the reference has an object: that of the package, as users import it."""
    if name.startswith("sfr"):
        return name
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
