"""The study from tiles to its table, on a few rendered pictures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from calib.errors import ExistsError, MissingFileError

from ..scripts import ROOT, load_script

SCRIPT = ROOT / "studies" / "run.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("studies/run.py")


def test_another_study_does_not_go_on_in_the_same_folder(study: ModuleType, tmp_path: Path) -> None:
    asked = study.Study(*[tmp_path / "a.json"] * 3, tmp_path, ("--size", "9"), (), (), 1, 10, "iou")
    study._begin(asked, tmp_path / "out")
    study._begin(replace(asked, seeds=3), tmp_path / "out")
    with pytest.raises(ExistsError):
        study._begin(replace(asked, tiles=("--size", "10")), tmp_path / "out")
    with pytest.raises(MissingFileError):
        study.run(asked, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_quick_study_runs_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "q" / "table.json").read_bytes())
    assert [row["head"] for row in rows] == ["chosen", "chosen-calibrated", "control", "detector"]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("AP50", "AP fixed", "D-ECE"))
    assert all(-1 <= row[f"AP50-{bin_}"] <= 100 for row in rows for bin_ in (1, 2) if f"AP50-{bin_}" in row)
    assert all(0 <= row["AP"] <= 100 and ("gain AP" in row) == (row["head"] != "control") for row in rows)
    assert done.stdout == (tmp_path / "q" / "table.md").read_text()
    detector = tmp_path / "q" / "seed-0" / "detector.safetensors"
    before, commands = detector.stat().st_mtime_ns, (tmp_path / "q" / "commands.sh").read_text()
    (tmp_path / "q" / "table.md").unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert detector.stat().st_mtime_ns == before and (tmp_path / "q" / "commands.sh").read_text() == commands
