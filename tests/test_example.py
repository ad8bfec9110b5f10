"""The example of a new method in docs/development.md: one file and one registry line, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from calib import registry
from calib.artifact import load
from calib.train import train
from calib.tune.search import Plan, tune

from .test_methods import NAMED_IN_MODULES
from .toy import Toy

PAGE = (Path(__file__).parents[1] / "docs" / "development.md").read_text()


def test_the_example_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.split("\n## A new method\n")[1].split("\n## ")[0]
    source, line = re.findall(r"```py\n(.*?)```", section, re.S)
    assert all(word in source for word in NAMED_IN_MODULES)
    ruff = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "calib/heads/smoothing.py", "-"]
    checked = subprocess.run(ruff, input=source, text=True, capture_output=True, cwd=Path(__file__).parents[1])
    assert checked.returncode == 0, checked.stdout
    module = ModuleType("calib.heads.smoothing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    entry = eval(line.strip(), {"MethodInfo": registry.MethodInfo})
    monkeypatch.setitem(registry.METHODS, entry.name, entry)
    cache = Toy().write(tmp_path / "cache")
    plain = train("natural", cache, tmp_path / "plain", {"steps": 40, "warmup_steps": 0})
    same = train(entry.name, cache, tmp_path / "zero", {"steps": 40, "warmup_steps": 0, "smoothing": 0})
    smooth = train(entry.name, cache, tmp_path / "some", {"steps": 40, "warmup_steps": 0})
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same.head.scores(x), plain.head.scores(x))
    assert not torch.allclose(smooth.head.scores(x), plain.head.scores(x))
    assert load(tmp_path / "some").info.method == entry.name
    judged = Toy(mode="test").write(tmp_path / "tune")
    plan = Plan(trials=2, steps=4, seeds=1, finalists=1, methods=(entry.name,))
    assert "smoothing" not in tune(cache.path, judged.path, tmp_path / "defaults", plan).chosen.settings
    space = re.findall(r"`space: ClassVar\[dict\[str, Any\]\] = (.*?)`", section)
    module.Smoothing.space = eval(space[0])  # type: ignore[attr-defined]
    searched = tune(cache.path, judged.path, tmp_path / "searched", plan).chosen
    assert {"smoothing", "lr"} <= set(searched.settings)
