"""What pyproject.toml cannot say: the README as a package index shows it, where relative links lead nowhere."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")


def readme_of_the_package() -> str:
    """Return the README with its links into the repository absolute or, if that has no public address, as plain text.

    The address is ``Repository`` among the project URLs of pyproject.toml, as of GitHub, without a slash at the end.
    """
    stated = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if stated is None:
            return "" if picture else text
        place = target if target.startswith("#") else f"/{'raw' if picture else 'blob'}/HEAD/{target}"
        return f"{picture}[{text}]({stated[1]}{place})"

    return RELATIVE_LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=readme_of_the_package(), long_description_content_type="text/markdown")
