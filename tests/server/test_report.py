"""The page of ``calib report`` at ``/report``: off unless asked for, behind the same keys, and harmless."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from calib.artifact import save
from calib.errors import MissingFileError, SettingError
from calib.report.page import html
from calib.server.serve_settings import read_settings

from .conftest import Server, artifact, running


def page() -> str:
    """A small one, with one head and three categories."""
    group = {"key": "AP1", "label": "below 10", "n": 3, "bin": 0}
    head = {"name": "crt", "metrics": {"AP": 0.5, "AP50": 0.5, "AR": 0.5, "AP1": 0.5}, "fitted": None}
    categories = {"id": [1, 2, 3], "name": ["a", "b", "c"], "frequency": [None] * 3, "count": [1, 2, 3]}
    categories |= {"bin": [0, 0, 0], "objects": [1, 1, 1], "ap": [[0.5, 0.5, 0.5]]}
    sections = ("reliability", "confusion", "kinds", "cut", "norms", "training", "examples")
    data: dict[str, Any] = {
        "title": "Heads served here",
        "notes": [],
        "version": "0",
        "written": "today",
        "cap": 300,
        "style": "lvis",
    }
    data |= {"iouType": "bbox", "nCategories": 3, "baseline": 0, "best": 0, "groups": [group], "heads": [head]}
    data |= {"categories": categories, "falseKinds": [], "cut": [], "confusion": {"outcomes": [], "pairs": []}}
    return html(data | {"examples": [], "missing": dict.fromkeys(sections, "not there")})


def test_no_report_is_served_unless_it_is_asked_for(http: httpx.Client) -> None:
    reply = http.get("/report")
    assert reply.status_code == 404 and "calib report" in reply.json()["error"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key and a report beside its models."""
    folder = tmp_path_factory.mktemp("reporting")
    save(folder / "models" / "head" / "1", artifact(1))
    (folder / "report.html").write_text(page())
    settings = {"report": str(folder / "report.html"), "api_keys": "alpha"}
    with running(folder / "models", folder / "log", **settings) as server:
        yield server
        assert "internal error" not in server.log.read_text()


def test_a_browser_draws_the_served_page(served: Server, browser: Any) -> None:
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"X-API-Key": "alpha"}})
    try:
        browser.get(f"{served.url}/report")
        assert browser.find_element("tag name", "html").get_attribute("data-ready") == "true"
        assert len(browser.find_elements("css selector", "svg[class^=plot]")) >= 3
        assert browser.get_log("browser") == []
        # Not even a script of the page's own could ask the service for anything.
        fetched = browser.execute_async_script(
            "const done = arguments[0]; fetch('/v2').then(() => done('answered'), () => done('refused'))"
        )
        assert fetched == "refused" and "connect" in browser.get_log("browser")[0]["message"].lower()
    finally:
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})


def test_the_report_is_served_behind_the_keys_and_may_change(served: Server) -> None:
    report = served.models.parent / "report.html"
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/report").status_code == 401
        client.headers["X-API-Key"] = "alpha"
        reply = client.get("/report")
        assert reply.status_code == 200 and reply.text == report.read_text()
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert client.post("/report").status_code == 405
        report.write_text("another")
        assert client.get("/report").text == "another"
        report.unlink()
        assert client.get("/report").status_code == 404


def test_a_report_that_is_not_there_is_noticed_at_the_start(tmp_path: Path) -> None:
    settings = read_settings({"models": str(tmp_path), "report": str(tmp_path / "none.html")})
    with pytest.raises(MissingFileError, match=r"none\.html"):
        settings.check_files()
    with pytest.raises(SettingError, match="is a folder"):
        read_settings({"models": str(tmp_path), "report": str(tmp_path)}).check_files()
