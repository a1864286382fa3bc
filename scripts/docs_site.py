"""Hooks of mkdocs.yml: files outside of docs/ that pages link to, and the page of the API.

Pages link to each other and to files of the repository by path, as GitHub has it. In the site the
linked files lie under ``repository/``, and links are written anew to where their target is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import megatron_tst

ROOT = Path(__file__).parents[1]
# Two pages of one name in one folder: the front page of the repository is not that of the site.
FRONT_PAGE = "front-page.md"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def _place(path: str) -> str:
    """Where the site has a file of the repository, by its path there."""
    if path == "README.md":
        return FRONT_PAGE
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _path(place: str) -> str:
    """The reverse of `_place`."""
    if place == FRONT_PAGE:
        return "README.md"
    start = "repository/"
    return place.removeprefix(start) if place.startswith(start) else f"docs/{place}"


def _targets(text: str, path: str) -> set[str]:
    """Files of the repository that a page at a path links to."""
    links = (link for link in _LINK.findall(text) if "://" not in link)
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links}


def _api() -> str:
    """The public names, each with its docstring."""
    names = [f"::: {megatron_tst._MODULE_OF[n]}.{n}" for n in megatron_tst.__all__ if n[0] != "_"]
    return "# API\n\nAll of these are names of `megatron_tst`.\n\n" + "\n\n".join(names) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds the front page, what pages link to outside of docs/, and the API."""
    files.append(File.generated(config, "api.md", content=_api()))
    waiting, known = ["README.md"], {_path(file.src_uri) for file in files}
    for file in list(files.documentation_pages()):
        waiting += _targets(file.content_string, _path(file.src_uri))
    while waiting:
        path = waiting.pop()
        if path in known or not (ROOT / path).is_file():
            continue
        known.add(path)
        files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += _targets((ROOT / path).read_text(), path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Writes links to files of the repository to where the site has them."""
    here = page.file.src_uri
    folder = posixpath.dirname(_path(here))

    def placed(match: re.Match[str]) -> str:
        link = match[1]
        if "://" in link:
            return link
        place = _place(posixpath.normpath(posixpath.join(folder, link)))
        return posixpath.relpath(place, posixpath.dirname(here) or ".")

    return _LINK.sub(placed, markdown)
