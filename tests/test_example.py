"""The example of a new method in docs/development.md, in a copy of the tree: one file, one entry of the registry.

Every command that knows methods runs there, in one process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .test_methods import NAMED_IN_MODULES
from .toy import Toy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "development.md").read_text()

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from typer.testing import CliRunner
from calib.artifact import load
from calib.cli.main import app

def calib(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.stdout

work = Path(sys.argv[1])
short = ("--set", "steps=40", "--set", "warmup_steps=0", "--cache", work / "cache", "--device", "cpu")
calib("train", "natural", *short, "--out", work / "plain" / "1")
calib("train", "smoothing", *short, "--set", "smoothing=0", "--out", work / "zero" / "1")
calib("train", "smoothing", *short, "--out", work / "models" / "smoothing" / "1")
calib("train", "smoothing", "focal", "--one-pass", *short, "--base", "natural:steps=5", "--out", work / "both")
plain, zero, some = (load(work / p / "1").head for p in ("plain", "zero", "models/smoothing"))
x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(zero.scores(x), plain.scores(x))
assert not torch.allclose(some.scores(x), plain.scores(x))
for methods in ("smoothing", "all"):  # one without a space in its class, beside all others
    study = work / f"study-{methods}"
    calib("tune", "--cache", work / "cache", "--tune-cache", work / "tune", "--out", study, "--methods", methods,
          "--budget", "1", "--steps", "4", "--seeds", "1", "--finalists", "1", "--stacked", "1", "--processes", "1")
    assert json.loads((study / "study.json").read_text())["methods"].count("smoothing") == 1
assert "smoothing" in calib("methods") and "smoothing = 0.1" in calib("methods", "smoothing")
(row,) = [line for line in calib("methods", "--markdown").splitlines() if line.startswith("| `smoothing` |")]
assert "Szegedy" in row and "CE with targets" in row and "background is one more class" in row
calib("export", work / "models" / "smoothing" / "1", "--to", "onnx", "--cache", work / "tune", "--out", work / "h.onnx")
assert "smoothing" in calib("serve", "--models", work / "models", "--check")
"""


def test_the_example_takes_one_file_and_one_entry(tmp_path: Path) -> None:
    section = PAGE.split("\n## A new method\n")[1].split("\n## ")[0]
    source, entry = re.findall(r"```py\n(.*?)```", section, re.S)
    assert all(word in source for word in NAMED_IN_MODULES)
    copy = tmp_path / "tree"
    for part in ("calib", "cli", "server", "data"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "calib" / "methods" / "smoothing.py").write_text(source)
    registry = copy / "calib" / "registry.py"
    text = registry.read_text()
    assert text.count("\n)\n\nMETHODS") == 1
    registry.write_text(text.replace("\n)\n\nMETHODS", f"\n{entry.rstrip()},\n)\n\nMETHODS"))
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "calib/methods", "calib/registry.py"],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    Toy().write(tmp_path / "cache")
    Toy(mode="test").write(tmp_path / "tune")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
