"""The text of examples/studies/prose.py: what of a page of documentation is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from examples.studies.prose import PACKAGES, _pages

FRAME = "<nav>Home</nav><p>Next page</p>\n<script>let x = 1;</script>"


def write(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<html><head><title>T</title></head><body>{FRAME}\n{body}</body></html>")


def test_pages_without_their_frame_licences_and_copies_of_lines(tmp_path: Path) -> None:
    for i in range(30):
        body = f"<p>A sentence of page {i}.</p>\n" + "Some text. " * 60
        write(tmp_path / f"page{i:02}.html", body)
    write(tmp_path / "short.html", "<p>Short.</p>")
    write(tmp_path / "licence.html", "Words of a licence. " * 60)
    write(tmp_path / "page.de.html", "Deutsche W\N{LATIN SMALL LETTER O WITH DIAERESIS}rter. " * 60)
    write(tmp_path / "alone.html", "A text of its own. " * 40)
    left_out: Counter[str] = Counter()
    pages = list(_pages(tmp_path, left_out))
    # "Some text." stands in 30 pages, and so belongs to their frame.
    assert pages == ["A text of its own. " * 39 + "A text of its own.\n"]
    assert left_out == {"licences, indexes and other languages": 2, "short pages": 31}


def test_the_list_names_versions_and_folders() -> None:
    lines = [line for line in PACKAGES.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines)) > 30
    for line in lines:
        package, folder = line.split()
        name, version = package.split("=")
        assert name
        assert version[0].isdigit()
        assert folder.startswith("usr")
