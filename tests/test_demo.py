"""The whole product at a small scale: calib demo, and every command and program of the pages on what it leaves."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from calib.artifact import load
from calib.cache import Cache
from calib.cli.main import app
from calib.demo.demo import CAPS, DemoSettings, entries, request_of
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.improve.jobs import jobs_of
from calib.improve.judging import Judge
from calib.improve.request import CONVERGED as CONTROL
from calib.improve.table import collect
from calib.registry import METHODS

from .conftest import HEED_CTRL_C

ROOT = Path(__file__).parents[1]
# In this order: later commands use what earlier ones wrote.
NAMES = ("README", "docs/extraction", "docs/methods", "docs/caches", "docs/evaluation", "docs/service", "docs/export")
PAGES = {name: (ROOT / f"{name}.md").read_text() for name in NAMES}
SCALE = ["--scale", "0.005", "--processes", "1"]
CALIB = [sys.executable, "-m", "calib.cli"]


def calib(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*CALIB, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)


def inside(home: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The same command in this process, in the folder ``home``."""
    monkeypatch.chdir(home)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished ``demo/`` in it."""
    folder = tmp_path_factory.mktemp("home")
    done = calib("demo", *SCALE, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]
    return folder


def test_all_methods_are_in_the_demo() -> None:
    assert {e.method for e in entries(every_method=True)} == set(METHODS)
    assert CONTROL in {e.name for e in entries()}


def test_the_demo_leaves_what_it_promises(home: Path) -> None:
    demo = home / "demo"
    for split in ("train", "tune", "val"):
        assert Cache(demo / "caches" / split).n_rows > 0
    for entry in entries():
        assert load(demo / "models" / entry.name / "1").info.method == entry.method
        assert pq.read_table(demo / "detections" / f"{entry.name}.parquet").num_rows > 0
        for folder in ("results", *(f"results-{cap}" for cap in CAPS)):
            assert (demo / folder / entry.name / "per_category.parquet").exists()
    for name in ("ap_per_bin.png", "weight_norms.png", "gain_per_category.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG") and (demo / name).stat().st_size > 10_000
    assert "natural-converged" in (demo / "report.html").read_text()
    for entry in entries():
        folder = demo / "results" / entry.name
        summary = json.loads((folder / "summary.json").read_text())
        assert (folder / "matches.parquet").exists() and summary["reliability"]
        assert summary.get("difference", {"to": CONTROL})["to"] == CONTROL
    assert not [p for p in demo.rglob("*") if p.name.endswith((".tmp", ".training"))]


def test_the_table_holds_the_metrics_of_the_results(home: Path, tmp_path: Path) -> None:
    demo = home / "demo"
    text = (demo / "table.md").read_text()
    request = request_of(demo, DemoSettings(scale=0.005), 1)
    assert request.table is not None
    jobs = jobs_of(demo, Judge.of(request, demo / "caches" / "val"), request.table)
    table = collect(request.folder, jobs, request.beside, CONTROL)
    assert table.markdown() == text and [row.head for row in table.of_cap(CAPS[0])][-1] == "chosen"
    for cap in CAPS:
        row = next(r for r in table.of_cap(cap) if r.head == "crt")
        detections = demo / "detections" / "crt.parquet"
        again = evaluate_files(
            demo / "data" / "val.json", [detections], [tmp_path / str(cap)], Options(max_detections=cap)
        )[0]
        assert row.means["AP"] == 100 * again.summary["AP"]
        line = next(x for x in text.split(f"## At most {cap}")[1].splitlines() if x.startswith("| crt "))
        assert f"{100 * again.summary['AP']:.1f}" in line
    assert table.counts["AP"] == sum(table.counts[f"AP{k}"] for k in (1, 2, 3, 4))
    control = next(r for r in table.of_cap(CAPS[0]) if r.head == CONTROL)
    assert table.gain(control) == ""


def test_the_detector_itself_stands_in_the_table(home: Path) -> None:
    """softmax copies the detector's classifier; its cached logits are those of the features."""
    cache = Cache(home / "demo" / "caches" / "val")
    head = load(home / "demo" / "models" / "softmax" / "1").head
    np.testing.assert_array_equal(head.state_dict()["classifier.weight"].numpy(), cache.classifier.weight)


def test_a_finished_demo_is_not_done_again(home: Path) -> None:
    watched = [p for p in (home / "demo").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".parquet")]
    before = {p: p.stat().st_mtime_ns for p in watched}
    assert calib("demo", *SCALE, cwd=home).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in watched} == before


def test_other_settings_and_foreign_folders_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = inside(home, monkeypatch, "demo", "--scale", "0.5")
    assert done.exit_code == 2 and "other settings" in done.stderr and "hint:" in done.stderr
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").write_text("all of it")
    done = inside(home, monkeypatch, "demo", "--out", "mine")
    assert done.exit_code == 2 and "is no demo" in done.stderr
    assert (home / "mine" / "thesis.txt").read_text() == "all of it"
    for wrong in (["--seeds", "0"], ["--scale", "0"], ["--scale", "nan"], ["--data-seed", "-1"]):
        done = inside(home, monkeypatch, "demo", "--out", "other", *wrong)
        assert done.exit_code == 2 and "error:" in done.stderr
        assert not (home / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_demo_goes_on(home: Path, tmp_path: Path, stop: signal.Signals, code: int) -> None:
    """Stopped while heads are trained; the same command then gives the same heads."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = f"{HEED_CTRL_C}\nfrom calib.cli.main import app\napp()"
    command = [sys.executable, "-c", program, "demo", *SCALE]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 120
    heads = [tmp_path / "demo" / "models" / entry.name / "1" for entry in entries()]
    while not any(head.exists() for head in heads) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, stop)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert calib("demo", *SCALE, cwd=tmp_path).returncode == 0
    for entry in entries():
        ours, theirs = (h / "demo" / "models" / entry.name / "1" / "head.safetensors" for h in (tmp_path, home))
        assert ours.read_bytes() == theirs.read_bytes(), entry.name


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


COMMANDS = [line for page in PAGES for block in blocks("bash", page) for line in block.splitlines() if line]


@pytest.mark.parametrize("line", list(dict.fromkeys(COMMANDS)))
def test_every_command_of_the_pages_runs(home: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = []
    for word in shlex.split(line):
        found = sorted(home.glob(word)) if "*" in word and "/" in word else []
        words += [str(p.relative_to(home)) for p in found] or [word]
    assert words[0] == "calib"
    done = inside(home, monkeypatch, *words[1:])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[int]:
    """``calib serve`` on a free port."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*CALIB, "serve", "--models", "demo/models", "--port", "0"]
    process = subprocess.Popen(command, cwd=home, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
        if "startup complete" in line:
            break
    yield port
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def run_programs(page: str, service: int = 8000) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks("python", page):
        exec(block.replace("127.0.0.1:8000", f"127.0.0.1:{service}"), names)
    return names


@pytest.mark.parametrize("page", ["README", "docs/service", "docs/caches"])
def test_every_program_of_the_pages_runs(home: Path, service: int, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    names = run_programs(page, service)
    if page == "docs/caches":
        assert names["rows"].shape[1] == 256
    else:
        assert isinstance(names["scores"], np.ndarray) and names["scores"].shape == (150, 192)
        assert names["found" if page == "README" else "detections"]


def test_every_program_on_exports_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On what the commands before have written."""
    monkeypatch.chdir(home)
    names = run_programs("docs/export")
    assert set(names["detections"]) == {"boxes", "labels", "scores"}
    assert names["scores"].shape == (150, 192)
