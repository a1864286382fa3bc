"""Makes one file of English documentation and books out of packages of Debian 12.

    python examples/studies/prose.py --output runs/studies/text/prose.jsonl

It needs a machine whose apt knows the packages of prose-packages.txt in these versions: Debian 12.
A line of the output is a page, {"text": ...}, in the order of the list. Licences, indexes,
changelogs, pages of under 500 characters, and pages that came before are left out, and counted.
Lines that stand in many pages of a package, menus and headings, are left out too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lxml import etree, html

PACKAGES = Path(__file__).with_name("prose-packages.txt")
_LEFT_OUT = re.compile(
    r"genindex|py-modindex|search|copyright|licen[cs]e|gpl|gfdl|fdl|legal|changelog|changes|print\.html"
    r"|release|_sources|_static|whatsnew|contributors|\.(de|es|fr|it|ja|pl|pt|ru|zh)[-.]",
    re.IGNORECASE,
)
_SHORTEST = 500
# A line of a package in more of its pages than this belongs to their frame.
_MANY_PAGES = 20


def main() -> int:
    """Returns the exit code: 0, or 1 with a message if a package cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary, output.open("w", encoding="utf-8") as file:
        for line in PACKAGES.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                continue
            package, folder = line.split()
            try:
                root = _unpacked(package, Path(temporary))
            except (OSError, subprocess.CalledProcessError) as error:
                output.unlink()
                print(
                    f"{package} cannot be had ({error}): run this on Debian 12 with apt, after "
                    "apt-get update.",
                    file=sys.stderr,
                )
                return 1
            written = 0
            for text in _pages(root / folder, left_out):
                if text in seen:
                    left_out["copies"] += 1
                    continue
                seen.add(text)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
            print(f"{written / 1e6:6.2f} MB  {package} {folder}", flush=True)
    print(f"left out: {', '.join(f'{count} {name}' for name, count in sorted(left_out.items()))}")
    return 0


def _unpacked(package: str, folder: Path) -> Path:
    root = folder / package
    if not root.exists():
        subprocess.run(
            ["apt-get", "download", "-qq", package], cwd=folder, check=True, capture_output=True
        )
        name = package.split("=")[0]
        (archive,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True, capture_output=True)
        archive.unlink()
    return root


def _pages(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    pages = []
    for path in sorted(folder.rglob("*.html")):
        if (
            not path.is_file()
            or path.is_symlink()
            or _LEFT_OUT.search(str(path.relative_to(folder)))
        ):
            left_out["licences, indexes and other languages"] += 1
            continue
        pages.append(_lines(path))
    in_pages = Counter(line for page in pages for line in set(page))
    for page in pages:
        kept = [line for line in page if not line or in_pages[line] <= _MANY_PAGES]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"
        if len(text) < _SHORTEST:
            left_out["short pages"] += 1
            continue
        yield text


def _lines(path: Path) -> list[str]:
    """The text of a page, without what browsers do not show."""
    try:
        page = html.fromstring(path.read_bytes())
    except (etree.ParserError, ValueError):
        return []
    hidden = ("script", "style", "head", "nav", "footer", etree.Comment)
    etree.strip_elements(page, *hidden, with_tail=False)
    return [re.sub(r"[ \t\xa0]+", " ", line).strip() for line in page.text_content().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
