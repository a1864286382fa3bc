"""The report in a real browser without a network: it draws, answers the mouse and fits windows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from megatron_tst.commands.compare_runs import main
from megatron_tst.report.results_table import write_results
from tests.unit.synthetic_runs import line, synthetic_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: scripts/install_system_packages.sh"
)

WINDOWS = [(360, 740), (1000, 800), (1920, 1080)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over s and r with two seeds and baselines of two lengths."""
    results = [
        synthetic_run(
            line(3.0 - 0.01 * size - 0.01 * seed, steps),
            bag_size=size,
            step_ratio=ratio,
            total_steps=steps,
            seed=seed,
        )
        for seed in (1, 2)
        for size, ratio, steps in (
            (1, 0.25, 100),
            (1, 0.25, 200),
            (2, 0.25, 100),
            (2, 0.5, 100),
            (4, 0.25, 100),
        )
    ]
    folder = tmp_path_factory.mktemp("report")
    write_results(results, folder / "results.csv")
    output = folder / "report.html"
    assert main([str(folder / "results.csv"), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page that was opened, and what it did that a report must not do."""

    def __init__(self, browser: Any, report: Path, **options: Any) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(report.as_uri())


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Any]:
    opened: list[Visit] = []

    def open_page(**options: Any) -> Visit:
        opened.append(Visit(browser, report, **options))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()


def test_nothing_is_fetched_and_nothing_fails(visit: Any, report: Path) -> None:
    seen = visit()
    assert seen.requests == [report.as_uri()]
    assert seen.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_figures_have_a_size_and_the_page_fits_its_window(
    visit: Any, width: int, height: int, scheme: str
) -> None:
    page = visit(viewport={"width": width, "height": height}, color_scheme=scheme).page
    sizes = page.eval_on_selector_all(
        "figure svg", "all => all.map(e => [e.clientWidth, e.clientHeight])"
    )
    # Gaps, heat map, over s, over r, off ends, and the five curves.
    assert len(sizes) == 11
    assert all(w > 300 and h > 100 for w, h in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_pages_draw_in_the_colour_of_their_text(visit: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).page
        text, background = page.evaluate(
            "[getComputedStyle(document.querySelector('figure svg text')).fill,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert text == page.evaluate("getComputedStyle(document.body).color")
        colours.append((text, background))
    assert colours[0] != colours[1]
    assert colours[0][0] != colours[1][0]


@pytest.mark.parametrize("width", [360, 1000])
def test_a_point_shows_its_value_at_once(visit: Any, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800}).page
    assert page.locator(".tip").is_hidden()
    figure = page.locator("figure:has(figcaption b:text-is('Equal FLOPs.'))")
    # The last one drawn lies on top of those that are near to it.
    place = figure.locator(".value").last
    place.scroll_into_view_if_needed()
    place.hover(force=True)
    tip = page.locator(".tip")
    assert tip.is_visible()
    shown = r"s=. r=0\.\d+: \d\.\d{4} . \d\.\d{4} \(2 seeds\) at 1\.60 k equivalent tokens"
    assert re.fullmatch(shown, tip.inner_text())
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.mouse.move(1, 1)
    assert tip.is_hidden()


def test_the_target_lies_where_the_point_is_drawn(visit: Any) -> None:
    """The targets are placed by arithmetic; the markers by Matplotlib."""
    page = visit().page
    figure = page.locator("figure:has(figcaption b:text-is('Equal FLOPs.'))")
    distances = figure.evaluate(
        """figure => {
          const centre = e => { const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2]; };
          const markers = [...figure.querySelectorAll('use')].map(centre);
          return [...figure.querySelectorAll('.value')].map(target => {
            const [x, y] = centre(target);
            return Math.min(...markers.map(([a, b]) => Math.hypot(a - x, b - y)));
          });
        }"""
    )
    assert len(distances) > 10
    # CSS pixels, of which a marker is about 5 wide.
    assert max(distances) < 1.5


def test_without_scripts_the_titles_are_there_to_read(visit: Any) -> None:
    page = visit(java_script_enabled=False).page
    titles = page.locator(".value title").all_text_contents()
    assert any(title.startswith("s=2 r=0.25: 2.9") for title in titles)
    assert page.locator("table").count() >= 4
