"""``calib export`` on the command line: metrics on stdout, every refusal with its reason and nothing left."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.training import train

from ..toy import Toy

Calib = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cache/`` and two heads under ``models/``."""
    folder = tmp_path_factory.mktemp("made")
    cache = Toy().write(folder / "cache")
    train("norcal", cache, folder / "models" / "norcal" / "1")
    train("ncm", cache, folder / "models" / "ncm" / "2")
    other = Toy(seed=1).write(folder / "other")
    train("softmax", other, folder / "models" / "other" / "1")
    return folder


def test_the_report_says_how_far_the_export_is_from_the_head(calib: Calib, made: Path, tmp_path: Path) -> None:
    arguments = [made / "models/ncm/2", "--to", "torch", "--cache", made / "cache", "--out", tmp_path / "ncm.pt2"]
    done = calib("export", *arguments, "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)
    assert metrics["largest_difference"] <= metrics["tolerance"] == 1e-5 and metrics["rows"] > 100
    assert (metrics["kind"], metrics["input"], metrics["output"]) == ("ncm", "FEATURES [N, 8]", "SCORES [N, 7]")
    plain = calib("export", *arguments, "--rows", 5)
    assert "largest_difference" in plain.stdout and "rows                5" in plain.stdout


def test_refusals_say_why_and_leave_nothing(fails: Fails, made: Path, tmp_path: Path) -> None:
    (tmp_path / "d.pth").write_bytes(b"no checkpoint")
    out, cache = tmp_path / "out.pth", ["--cache", made / "cache"]
    norcal, ncm, other = (made / "models" / name for name in ("norcal/1", "ncm/2", "other/1"))
    for arguments, said in (
        ([norcal, "--to", "onxx", *cache], "Did you mean 'onnx'"),
        ([norcal, "--to", "mmdet", *cache], "needs the checkpoint of the detector"),
        ([norcal, "--to", "mmdet", *cache, "--checkpoint", tmp_path / "absent.pth"], "checkpoint not found"),
        ([norcal, "--to", "mmdet", *cache, "--checkpoint", tmp_path / "d.pth"], "d.pth cannot be read"),
        ([norcal, "--to", "torch", *cache, "--part", "tail"], "not composed of others"),
        ([norcal, "--to", "torch", *cache, "--tolerance", "0"], "above 0"),
        ([norcal, "--to", "module", *cache], "no box regression"),
        ([other, "--to", "torch", *cache], "was fitted for detector"),
        ([ncm.parent / "7", "--to", "torch", *cache], "head not found"),
    ):
        assert said in fails("export", *arguments, "--out", out)
        assert not out.exists()


def test_without_onnx_only_onnx_is_missing(made: Path, tmp_path: Path) -> None:
    """A bare ``pip install calib-longtail`` has neither onnx nor onnxruntime."""
    code = f"""
import sys
for name in ("onnx", "onnxscript", "onnxruntime"):
    sys.modules[name] = None
from pathlib import Path
from calib.errors import MissingExtraError
from calib.export.export import Export, export
made, out = Path({str(made)!r}), Path({str(tmp_path)!r})
export(made / "models/ncm/2", made / "cache", out / "a.pt2", Export("torch"))
for to in ("onnx", "triton"):
    try:
        export(made / "models/ncm/2", made / "cache", out / to, Export(to))
    except MissingExtraError as e:
        assert "calib-longtail[export]" in e.hint
    else:
        raise AssertionError("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"]
