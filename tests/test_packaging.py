"""What is installed, and what an import costs."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from calib import __version__
from calib.artifact import Artifact, HeadInfo, save
from calib.cache import Cache
from calib.errors import DISTRIBUTION, MissingExtraError
from calib.heads.detector import detector_head

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_OF = {"calib": "calib", "cli": "calib.cli", "server": "calib.server", "data": "calib.data.shipped"}
# Compared with by tests; users keep them installed to check calib against the reference evaluators.
USED_BY_TESTS = {"lvis", "pycocotools"}


def test_the_package_list_equals_the_folders() -> None:
    found = set()
    for folder, package in PACKAGE_OF.items():
        for path in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]:
            if path.name == "__pycache__" or not any(p.is_file() for p in path.iterdir()):
                continue
            found.add(".".join((package, *path.relative_to(ROOT / folder).parts)))
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of the build lands in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "calib"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_only_calib(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"calib", f"calib_longtail-{__version__}.dist-info"}
    assert f"calib_longtail-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_wheel_holds_every_file_that_the_code_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in PACKAGE_OF.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT / folder).as_posix()
                assert f"{package.replace('.', '/')}/{relative}" in names


def test_hints_and_pages_install_this_project() -> None:
    """``calib`` on PyPI is another project: hints and pages name ours, or a checkout, and an extra that it has."""
    project = PROJECT["project"]
    assert project["name"] == DISTRIBUTION != "calib" and project["version"] == __version__
    assert MissingExtraError("onnx", "export").hint == f"pip install '{DISTRIBUTION}[export]'"
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts += [p for f in ("calib", "cli", "server", "data", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    named = [m for p in texts for m in re.findall(r"([\w./-]*calib[\w.-]*)\[([a-z0-9,]+)\]['\"`]", p.read_text())]
    assert len(named) >= 5
    for name, extras in named:
        assert name in (DISTRIBUTION, "./calib"), name
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def test_the_licence_is_stated_alike() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_constraints_hold_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, separator, version = line.partition("==")
        assert separator and name.replace("-", "").replace("_", "").replace(".", "").isalnum(), line
        assert version and not set(version) - set("0123456789.abcdevoprst+"), line


def test_every_dependency_is_pinned_and_used() -> None:
    def plain(text: str) -> str:
        return text.split(">=")[0].split("[")[0].lower().replace("-", "_")

    pins = {plain(line.replace("==", ">=")) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = {plain(d) for d in PROJECT["project"]["dependencies"]}
    assert wanted <= pins
    sources = "\n".join(p.read_text() for f in ("calib", "cli", "server", "data") for p in (ROOT / f).rglob("*.py"))
    module = {"pillow": "PIL", "scikit_learn": "sklearn"}
    unused = {
        d for d in wanted if f"import {module.get(d, d)}" not in sources and f"from {module.get(d, d)}" not in sources
    }
    assert unused <= USED_BY_TESTS


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["serve", "--help"], ["demo", "--help"]])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["calib", *{arguments}]
try:
    from calib.cli.main import app
    app()
except SystemExit as e:
    assert not e.code, e.code
heavy = {{"torch", "pyarrow", "duckdb", "numpy", "fastapi", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_what_computes_nothing_imports_no_torch(train_cache: Cache, tmp_path: Path) -> None:
    """All in one process, which names the first command that does."""
    head, cache, shapes = tmp_path / "head" / "1", str(train_cache.path), tmp_path / "set"
    save(head, Artifact(detector_head(train_cache), HeadInfo.of(train_cache, "softmax", {}, 0, [])))
    found = [{"image_id": 2_000_001, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    size = ("--categories", "6", "--images", "4", "--tune-per-category", "1", "--val-per-category", "2")
    judged = ("--annotations", str(shapes / "val.json"), "--results", str(tmp_path / "found.json"))
    commands = [
        ["show", str(head)],
        ["show", cache],
        ["cache", "info", cache],
        ["cache", "check", cache],
        ["methods"],
        ["data", "shapes", "--out", str(shapes), *size, "--processes", "1"],
        ["evaluate", *judged, "--out", str(tmp_path / "result")],
        ["analyze", str(tmp_path / "result"), "--question", "ap_per_bin"],
    ]
    code = f"""
import sys
from calib.cli.main import app
for arguments in {commands}:
    try:
        app([*arguments, "--json"])
    except SystemExit as e:
        assert not e.code, (arguments, e.code)
    assert "torch" not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(commands)


def test_without_torchvision_everything_but_extraction_imports() -> None:
    """A bare ``pip install calib-longtail`` has no torchvision: only opening a torchvision detector may miss it."""
    code = """
import sys
sys.modules["torchvision"] = None
import calib.cli.main, calib.training, calib.score, calib.evaluate, calib.analysis, calib.server.app
import calib.extract.extraction
import torch
from calib.errors import MissingExtraError
from calib.extract.torchvision import open_detector
try:
    open_detector("fasterrcnn_resnet50_fpn", torch.device("cpu"))
except MissingExtraError as e:
    assert "calib-longtail[torchvision]" in e.hint
else:
    raise AssertionError("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
