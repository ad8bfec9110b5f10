"""The pages of the adapters are true: their commands and their Python run as they stand, from top to bottom."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "dense": ("ultralytics", "torchvision"),
    "raw": (),
    "torchvision": ("torchvision",),
    "transformers": ("transformers", "torchvision"),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, calib: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # pages that write a module
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    names: dict[str, Any] = {}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, f"{page}.md", "exec"), names)
            continue
        for line in text.replace("\\\n", "").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "calib"
            done = calib(*arguments)
            assert done.exit_code == 0, (line, done.stderr, done.exception)
