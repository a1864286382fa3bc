"""What the documentation quotes is in the code, and what it links to is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "findings/README.md")),
    *DOCS,
]
# Code marks that stand first in the row of a table whose first column is called "message".
TABLES = re.findall(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TROUBLESHOOTING, re.M)
MESSAGES = [quoted for table in TABLES for quoted in re.findall(r"^\| `([^`]+)`", table, re.M)]
VARIABLE = "\0"


def texts_of_the_code() -> str:
    """Every string of the package, with one character in place of what a run puts in."""
    found = []
    for path in sorted((ROOT / "megatron_tst").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else VARIABLE for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.fixture(scope="module")
def code() -> str:
    return texts_of_the_code()


def is_in(code: str, quoted: str) -> bool:
    fixed = (re.escape(part) for part in quoted.split("..."))
    return re.search("[^\n]*?".join(fixed), code) is not None


def test_all_messages_are_found_in_the_page() -> None:
    assert len(MESSAGES) == sum(len(table.splitlines()) for table in TABLES) >= 40


@pytest.mark.parametrize("quoted", MESSAGES)
def test_quoted_messages_are_those_of_the_code(code: str, quoted: str) -> None:
    assert len(quoted.replace(".", "")) >= 10
    assert is_in(code, quoted)


def test_a_message_that_is_not_in_the_code_is_seen(code: str) -> None:
    assert is_in(code, "--tst-max-epochs is ... and this run reads")
    assert not is_in(code, "--tst-max-epochs is ... but this run reads")


def test_the_refusal_of_a_baseline_is_quoted_whole(code: str) -> None:
    """The values in docs/migrating.md are those that tests/integration/test_bad_input.py sees."""
    page = (ROOT / "docs/migrating.md").read_text()
    (quoted,) = re.findall(r"^error: (.*)$", page, re.M)
    for value in ("run", "--tst-bag-size 1,", "has 4", "--tst-bag-size 1,", "step 0"):
        assert value in quoted
    start = quoted.index("resume with")
    assert is_in(code, re.sub(r"(?<=size )1|(?<=step )0", "...", quoted[start:]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


def test_every_page_is_linked_from_the_overview() -> None:
    overview = (ROOT / "docs/README.md").read_text()
    missing = [page.name for page in DOCS if f"]({page.name}" not in overview]
    assert missing == ["README.md"]


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        check=True,
    )
    assert "MultiHotCrossEntropyLoss" in (tmp_path / "api.html").read_text()
    # A link that leads out of docs/ in the repository and stays within the site.
    assert 'href="repository/findings/' in (tmp_path / "host-faults.html").read_text()
