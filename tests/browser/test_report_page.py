"""The report in a browser: `pip install -e ".[browser]"`, a Chromium, and `pytest -m browser`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anima_peft.training.report import write_report
from tests.training.test_report import HOSTILE, write_run

pytestmark = pytest.mark.browser
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """`CHROMIUM` names the program; else one that is installed, or playwright's own, is taken."""
    api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, INSTALLED)), None)
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("一 run"), name="图 lora", text=HOSTILE))


@pytest.fixture
def show(browser: Any, report: Path) -> Iterator[Any]:
    """Open the page; whatever it complains of, fetches or pops up is a fault."""
    faults: list[str] = []
    contexts = []

    def opened(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    asked: list[str] = []
    yield opened
    assert faults == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()] * len(contexts)
    for context in contexts:
        context.close()


def colour_of(page: Any, what: str, selector: str = "body") -> tuple[int, ...]:
    text = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{what}")
    return tuple(int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(",")[:3])


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: tuple[int, ...]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_renders(show: Any, scheme: str, width: int) -> None:
    page = show(color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    paths = "[...document.querySelectorAll('.curve')].map((path) => path.getBoundingClientRect().width)"
    assert all(length > 0.4 * min(width, 400) for length in page.evaluate(paths))
    ground = colour_of(page, "backgroundColor", "section:nth-of-type(3)")
    assert (sum(ground) < 3 * 128) == (scheme == "dark")
    for selector in ("h2", ".muted", ".prompt", ".xs span"):
        assert contrast(colour_of(page, "color", selector), ground) >= 4.5, selector


def test_a_curve_tells_its_values_by_pointer_and_keyboard(show: Any) -> None:
    page = show(viewport={"width": 1200, "height": 900})
    readout = page.locator(".readout").first
    page.locator(".area").first.hover(position={"x": 3, "y": 50})
    assert "step 1 ·" in readout.inner_text()
    page.mouse.move(0, 0)
    assert "step" not in readout.inner_text()
    page.keyboard.press("Tab")
    page.locator(".plot").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert "step 29 · each step 0.03448" in readout.inner_text()


def test_both_languages(show: Any) -> None:
    page = show()
    assert page.get_by_role("heading", name="Curves").is_visible()
    page.get_by_label("中文").check()
    assert page.get_by_role("heading", name="曲线").is_visible()
    assert not page.get_by_text("Curves", exact=True).is_visible()
    assert show(locale="zh-CN").get_by_role("heading", name="曲线").is_visible()
    assert show(java_script_enabled=False).get_by_role("heading", name="Curves").is_visible()
