"""The page in a real browser: it draws, it obeys, and it says nothing on the console."""

import base64
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.report import write_report

from .conftest import EVIL, N_IMAGES, Split

SECTIONS = [
    *("summary", "heads", "bins", "front", "counts", "categories", "scores", "confusion", "kinds", "cap", "norms"),
    *("training", "examples"),
]
Page = webdriver.Chrome


def opened(browser: Page, path: Path, width: int = 1280, scheme: str = "light") -> Page:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("data-ready") == "true"
    return browser


def silent(browser: Page) -> bool:
    """Whether nothing stands on the console: no error, no warning, nothing that the page's policy refused."""
    return browser.get_log("browser") == []


@pytest.fixture(scope="module")
def path(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(out, split.report())
    return out


@pytest.fixture
def page(browser: Page, path: Path) -> Iterator[Page]:
    """The same, open on a desk."""
    yield opened(browser, path)
    assert silent(browser)


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )
    return found


def click(page: Page, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def box_of(page: Page, fieldset: str, label: str) -> Any:
    where = f"//fieldset[legend='{fieldset}']//label[normalize-space()='{label}']/input"
    return page.find_element(By.XPATH, where)


def choose(page: Page, label: str, name: str) -> None:
    select = page.find_element(By.XPATH, f"//label[span='{label}']/select")
    select.find_element(By.XPATH, f"./option[text()='{name}']").click()


def pixels(page: Page, clip: dict[str, float]) -> np.ndarray[Any, Any]:
    """[height, width, 3] of a part of the page."""
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip | {"scale": 1}})
    with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as picture:
        return np.array(picture.convert("RGB"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn(browser: Page, path: Path, width: int, scheme: str) -> None:
    page = opened(browser, path, width, scheme)
    assert [s.get_attribute("id") for s in page.find_elements(By.CSS_SELECTOR, "main > section")] == SECTIONS
    charts = page.execute_script(
        "return [...document.querySelectorAll('svg[class^=plot]')].map((svg) => {"
        " const b = svg.getBoundingClientRect(); return {x: b.x, y: b.y + scrollY, width: b.width, height: b.height,"
        " label: svg.ariaLabel,"
        " section: svg.closest('section').id}; })"
    )
    assert {chart["section"] for chart in charts} == set(SECTIONS) - {"summary", "heads", "examples"}
    paper = pixels(page, {"x": 0, "y": 0, "width": 4, "height": 4})[0, 0].astype(int)
    assert (paper.mean() > 200) == (scheme == "light")
    for chart in charts:
        seen = pixels(page, {k: chart[k] for k in ("x", "y", "width", "height")}).astype(int)
        drawn = np.abs(seen - paper).max(axis=2) > 60
        coloured = (seen.max(axis=2) - seen.min(axis=2)) > 25  # marks, not axes alone
        assert drawn.mean() > 0.003 and coloured.sum() > 30, chart["label"]
    page_width = page.execute_script("return document.documentElement.scrollWidth")
    assert page_width <= width, "the page is wider than the window"
    shown = page.execute_script("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert shown and silent(browser)


def test_names_are_text_and_nothing_else(page: Page) -> None:
    assert EVIL in texts(page, "#categories tbody th") and not page.find_elements(By.CSS_SELECTOR, "img[src=x]")


def test_the_summary_says_what_was_gained(page: Page) -> None:
    lead = texts(page, "#summary .lead")[0]
    assert lead.startswith("good has the highest AP of 3 heads") and "over base" in lead and "Rare classes gain" in lead
    rare = next(text for text in texts(page, "#summary .tile") if text.startswith("Rare"))
    assert "0.0 → 100.0" in rare and "+100.0" in rare and "95 %" in rare


def test_choosing_another_baseline_changes_every_comparison(page: Page) -> None:
    choose(page, "with", "noisy")
    assert "over noisy" in texts(page, "#summary .lead")[0]
    assert texts(page, "tr.is-baseline th") == [" noisy"]
    assert "95 %" not in "".join(texts(page, "#summary .tile"))  # the intervals are of differences to base
    choose(page, "head", "noisy")
    assert "compared with itself" in texts(page, "#summary .lead")[0]
    choose(page, "head", "base")
    assert "number 3 by AP" in texts(page, "#summary .lead")[0] or "number 2 by AP" in texts(page, "#summary .lead")[0]
    assert "base" in "".join(texts(page, ".example p"))


def test_a_head_that_is_switched_off_leaves_every_chart(page: Page) -> None:
    before = len(texts(page, "#front svg [aria-label=dot] path"))
    box_of(page, "Heads", "noisy").click()
    assert len(texts(page, "#front svg [aria-label=dot] path")) == before - 1 == 2
    assert "noisy" not in "".join(texts(page, "#heads, #bins svg, #front, #counts, #scores, #kinds, #cap, #training"))
    click(page, "button[aria-label='Heads: all or none']")
    assert "noisy" in "".join(texts(page, "#heads"))
    click(page, "button[aria-label='Heads: all or none']")
    assert "No head is chosen." in texts(page, "#bins")[0]


def test_a_bin_that_is_switched_off_leaves_its_panel_and_its_categories(page: Page) -> None:
    assert EVIL in "".join(texts(page, "#categories tbody th"))
    panels = len(texts(page, "#confusion .panel"))
    box_of(page, "Training instances", "below 10").click()
    assert len(texts(page, "#confusion .panel")) == panels - 1
    assert EVIL not in "".join(texts(page, "#categories tbody th")) and "below 10" not in texts(page, "#heads thead")[0]


def test_tables_sort_by_their_headers_from_the_keyboard(page: Page) -> None:
    header = page.find_elements(By.CSS_SELECTOR, "#heads thead button")[0]
    header.send_keys(Keys.ENTER)
    assert texts(page, "#heads tbody th") == [" base", " good", " noisy"]
    header = page.find_elements(By.CSS_SELECTOR, "#heads thead button")[0]
    header.send_keys(Keys.SPACE)
    assert texts(page, "#heads tbody th") == [" noisy", " good", " base"]
    sorts = [th.get_attribute("aria-sort") for th in page.find_elements(By.CSS_SELECTOR, "#heads thead th")]
    assert sorts[0] == "descending" and not any(sorts[1:]) and "head" in texts(page, "[role=status]")[0]


def test_categories_are_found_by_name(page: Page) -> None:
    page.find_element(By.CSS_SELECTOR, "#categories input").send_keys("kind 1")
    assert set(texts(page, "#categories tbody th")) == {"kind 10", "kind 11", "kind 12"}
    box_of(page, "Heads", "noisy").click()  # everything is drawn again
    assert page.find_element(By.CSS_SELECTOR, "#categories input").get_property("value") == "kind 1"
    assert set(texts(page, "#categories tbody th")) == {"kind 10", "kind 11", "kind 12"}


def test_a_pointer_over_a_point_names_it(page: Page) -> None:
    point = page.find_element(By.CSS_SELECTOR, "#front svg [aria-label=dot] path")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    webdriver.ActionChains(page).move_to_element(point).perform()
    assert "rare" in "".join(texts(page, "#front svg [aria-label=tip]"))


def test_whoever_does_not_see_has_headings_labels_and_tables(page: Page) -> None:
    levels = [
        int(tag[1])
        for tag in page.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
    ]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    charts = page.find_elements(By.CSS_SELECTOR, "svg[class^=plot]")
    assert all(c.get_attribute("role") == "img" and c.get_attribute("aria-label") for c in charts)
    behind = page.execute_script(
        "return [...document.querySelectorAll('figure:not(.example)')]"
        ".filter((f) => f.closest('section').id !== 'categories')"
        ".map((f) => f.querySelectorAll('details table tbody tr').length)"
    )
    assert behind and all(behind)  # of gains per category the table stands below the chart
    assert all(texts(page, "table caption")) and len(texts(page, "table caption")) == len(texts(page, "table"))
    assert all(image.get_attribute("alt") for image in page.find_elements(By.TAG_NAME, "img"))
    assert f"{len(SECTIONS)}" == str(len(texts(page, "nav a")))
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert first.text == "Skip to the report"
    first.send_keys(Keys.TAB)
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_on_paper_filters_are_gone_and_colours_are_light(browser: Page, path: Path) -> None:
    page = opened(browser, path, scheme="dark")
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    ink, aside = page.execute_script(
        "return [getComputedStyle(document.body).color, getComputedStyle(document.querySelector('aside')).display]"
    )
    assert ink == "rgb(26, 30, 36)" and aside == "none"
    printed = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 20_000


def test_a_single_bare_result_is_a_page_too(browser: Page, split: Split, tmp_path: Path) -> None:
    out = tmp_path / "one.html"
    bare = {"models": None, "images": None, "annotations": None}
    write_report(out, split.report(results=split.results("good", of="plain"), **bare))
    page = opened(browser, out)
    assert "One head only" in texts(page, "#summary .lead")[0]
    lacking = texts(page, "#lacking dd")
    assert len(lacking) >= 4 and any("--models" in line for line in lacking)
    assert not page.find_elements(By.ID, "scores") and silent(browser)


def test_without_counts_the_page_has_no_bins(browser: Page, split: Split, tmp_path: Path) -> None:
    document = json.loads(split.annotations.read_text())
    for category in document["categories"]:
        del category["instance_count"]
    (tmp_path / "val.json").write_text(json.dumps(document))
    outs = [tmp_path / "good", tmp_path / "base"]
    files = [split.folder / f"{path.name}.json" for path in outs]
    evaluate_files(tmp_path / "val.json", files, outs, Options(matches=True, calibration=True))
    write_report(tmp_path / "page.html", split.report(results=outs))
    page = opened(browser, tmp_path / "page.html")
    assert "Rare classes" in texts(page, "#summary .lead")[0] and not page.find_elements(By.ID, "confusion")
    assert len(texts(page, ".example")) == min(6, N_IMAGES) and silent(browser)
