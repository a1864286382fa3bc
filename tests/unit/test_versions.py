"""The command that tests other versions, and its table in docs/versions.md."""

from __future__ import annotations

import pytest

from tests.versions import ENVIRONMENTS, ROOT, TARGET, TESTS, _files, main, updated


def row(name: str, passed: int) -> list[str]:
    versions = ["3.12.1", "2.14.1", "3.8.0", "5.23.0", "2.5.5"]
    return [f"`{name}`", "chosen", *versions, str(passed), "0", "0", "5", "2 cores", "abc1234"]


def test_a_result_replaces_the_earlier_one_of_its_environment() -> None:
    page = TARGET.read_text()
    for name, passed in (("torch-2.15", 1), ("pinned", 2), ("torch-2.15", 3)):
        failures = ["test_a::test_b[c]"] if passed == 1 else []
        page = updated(page, row(name, passed), failures)
        # Another environment leaves it, the next result of the same takes it away.
        assert ("test_a::test_b[c]" in page) == (passed < 3)
    rows = [line for line in page.splitlines() if line.endswith("abc1234 |")]
    assert [line.split("|")[8].strip() for line in rows] == ["2", "3"]
    assert page.startswith(TARGET.read_text().partition("<!--")[0])
    assert page.endswith(TARGET.read_text().rpartition("-->")[2])


def test_an_unknown_environment_is_refused_with_the_names() -> None:
    with pytest.raises(SystemExit, match=r"no environment torch-1: pass some of .*torch-2\.15"):
        main(["torch-1"])


@pytest.mark.parametrize("tests", TESTS)
def test_chosen_tests_are_there(tests: str) -> None:
    for pattern in TESTS[tests].split():
        found = [*_files(pattern)]
        assert found, pattern
        file, _, test = found[0].partition("::")
        assert f"def {test}" in (ROOT / file).read_text()
    assert {e.tests for e in ENVIRONMENTS.values()} == set(TESTS)
