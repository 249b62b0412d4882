"""Hook of mkdocs: links that work on GitHub, out of the folder docs, work on the site as well.

A file that a page links to, such as an example or a JSON of results, is copied to the site. A folder cannot be: its
name stays and is no link. Some Markdown files outside docs, such as the changelog, are pages of the site, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md")
OUTSIDE_PAGES = {name.lower().replace("/readme", ""): ROOT / name for name in OUTSIDE}
COPIES = "repository"  # where on the site the copied files lie
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]*)\]\((?P<file>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs, and every other file there that a page links to."""
    for name, path in OUTSIDE_PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for page in list(files.documentation_pages()):
        for path in linked_outside(source_of(page)):
            name = copy_name(path)
            if path.is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a page lead to places on the site."""
    source = source_of(page.file)

    def on_site(link: re.Match[str]) -> str:
        path = target_of(source, link["file"])
        if path.is_dir():
            return link["text"]
        return f"[{link['text']}]({relative(page_name(path), page.file.src_uri)}{link['anchor'] or ''})"

    return LINK.sub(on_site, markdown)


def source_of(file: File) -> Path:
    """Return where in the repository the text of a page is."""
    return OUTSIDE_PAGES.get(file.src_uri, DOCS / file.src_uri)


def linked_outside(source: Path) -> Iterator[Path]:
    """Yield what a page links to that is no page or picture of docs."""
    for link in LINK.finditer(source.read_text()):
        path = target_of(source, link["file"])
        if page_name(path).startswith(f"{COPIES}/"):
            yield path


def target_of(source: Path, file: str) -> Path:
    """Return the path that a link of a page leads to."""
    return Path(os.path.normpath(source.parent / file))


def page_name(path: Path) -> str:
    """Return the name on the site of a file of the repository."""
    if path == ROOT / "README.md":
        return "index.md"
    for name, page in OUTSIDE_PAGES.items():
        if path == page:
            return name
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else copy_name(path)


def copy_name(path: Path) -> str:
    """Return the name on the site of a copied file, whose ending must not make it a page."""
    name = path.relative_to(ROOT).as_posix()
    return f"{COPIES}/{name}.txt" if path.suffix in (".py", ".sh", "") else f"{COPIES}/{name}"


def relative(name: str, page: str) -> str:
    """Return the way from one page to another file of the site."""
    return Path(os.path.relpath(name, Path(page).parent)).as_posix()
