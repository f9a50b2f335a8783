"""A page in a real browser: its charts are drawn, on a phone, dark and light, and on paper."""

import re

import pytest

from tests.report.browser import Browser, find_browser
from tests.report.folders import HOSTILE, write_bare_run, write_full_run
from tools import report_run

PHONE, DESK = 390, 1200  # pixels
TOO_WIDE = """
  [...document.querySelectorAll("body *")]
    .filter((element) => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest("thead"))
    .map((element) => element.outerHTML.slice(0, 80))
"""
PAPER = "getComputedStyle(document.body).backgroundColor"
INK_OF_A_CHART = "getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill"
EMPTY = """
  [...document.querySelectorAll("figure")]
    .filter((figure) => ![...figure.querySelectorAll(".mark-line path, .mark-rect path, .mark-symbol path")]
      .some((path) => path.getBoundingClientRect().width > 1))
    .map((figure) => figure.textContent.slice(0, 60))
"""
UNTITLED = """
  [...document.querySelectorAll("figure")]
    .filter((figure) => !figure.querySelector("figcaption").textContent.trim()
      || !figure.querySelector("svg .role-axis-title text")?.textContent)
    .length
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_full_run(folder / HOSTILE.replace("/", ""))
    write_bare_run(folder / "second", 1500)
    folders = [str(folder / HOSTILE.replace("/", "")), str(folder / "second")]
    assert report_run.main([*folders, "--output", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no browser: install Debian's chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(browser, page):
    """The page on a phone, once for all tests that only look at it in another light."""
    browser.show(page, PHONE, "light")
    return browser


@pytest.mark.parametrize(("width", "scheme"), [(DESK, "light"), (PHONE, "dark")])
def test_all_charts_are_drawn_within_the_window(browser, page, width, scheme):
    browser.show(page, width, scheme)
    num_charts = browser.evaluate("document.querySelectorAll('figure').length")
    assert num_charts >= 12
    assert browser.evaluate("document.querySelectorAll('.chart svg').length") == num_charts
    assert browser.evaluate("document.documentElement.dataset.drawn") == str(num_charts)
    assert browser.evaluate(EMPTY) == [] and browser.evaluate(UNTITLED) == 0
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints() == []
    assert set(browser.requests()) == {page.as_uri()}


def test_dark_and_light_differ_without_a_reload_and_each_can_be_read(shown):
    colours = {}
    for scheme in ("light", "dark"):
        shown.emulate(scheme)
        colours[scheme] = [brightness(shown.evaluate(what)) for what in (PAPER, INK_OF_A_CHART)]
    (light, on_light), (dark, on_dark) = colours["light"], colours["dark"]
    assert light > 240 and on_light < 60 and dark < 60 and on_dark > 200


def test_a_point_is_told_where_a_reader_points(shown):
    shown.evaluate("document.querySelector('figure').scrollIntoView()")
    corner = "(({x, y}) => [x, y])(document.querySelector('.chart svg').getBoundingClientRect())"
    x, y = shown.evaluate(corner)
    for away in (0, 2):
        shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 150 + away, y=y + 100)
    told = shown.evaluate("document.getElementById('vg-tooltip-element')?.textContent")
    assert told and all(word in told for word in ("run", "curve", "step", "value"))


def test_it_prints_black_on_white_on_several_pages(shown):
    shown.emulate("dark")
    printed = shown.pdf()
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) > 2
    shown.emulate("dark", media="print")
    assert brightness(shown.evaluate(PAPER)) > 240 and brightness(shown.evaluate(INK_OF_A_CHART)) < 60
    assert shown.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def brightness(colour: str) -> float:
    """Of "rgb(1, 2, 3)", the mean of the three."""
    return sum(int(part) for part in colour[4:-1].split(",")) / 3
