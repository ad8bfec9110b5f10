"""What several test folders share: a small rendered set, caches of it by the shipped detector, and the command line.

Caches are made once per session and never changed: tests that damage one take a copy (``copied``).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from calib.cache import Cache
from calib.data.plan import ShapesSettings
from calib.data.resources import shipped
from calib.data.shapes import build

Calib = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU are left out, and named, where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def detector_file() -> Path:
    """The shipped detector; its 192 categories are those of ``shapes_set``."""
    return shipped("shapes_detector.safetensors")


@pytest.fixture(scope="session")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 train, 12 tune and 24 val pictures of 144 pixels with all 192 categories."""
    out = tmp_path_factory.mktemp("shapes") / "set"
    build(out, ShapesSettings(images=72, tune_per_category=1, val_per_category=1))
    return out


@pytest.fixture(scope="session")
def make_cache(shapes_set: Path, detector_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cache]:
    """``make_cache(split, mode=..., dtype=..., logits=...)``: a cache of that split in 16 images per shard."""
    pytest.importorskip("torchvision")

    from calib.extract.dataset import Dataset
    from calib.extract.extraction import extract
    from calib.extract.options import Extraction
    from calib.extract.torchvision import open_detector

    torch.set_num_threads(1)
    adapter = open_detector(str(detector_file), torch.device("cpu"))

    def make(split: str, **settings: Any) -> Cache:
        out = tmp_path_factory.mktemp("caches") / split
        dataset = Dataset.read(shapes_set / f"{split}.json", counts_from=shapes_set / "train.json")
        extract(adapter, dataset, shapes_set / "images", out, Extraction(images_per_shard=16, **settings))
        return Cache(out)

    return make


@pytest.fixture(scope="session")
def train_cache(make_cache: Callable[..., Cache]) -> Cache:
    """The train split: float16, labelled and sampled."""
    return make_cache("train", mode="train")


@pytest.fixture(scope="session")
def val_cache(make_cache: Callable[..., Cache]) -> Cache:
    """The val split: float16, every proposal."""
    return make_cache("val", mode="test")


@pytest.fixture(scope="session")
def exact_val_cache(make_cache: Callable[..., Cache]) -> Cache:
    """The val split: float32, every proposal."""
    return make_cache("val", mode="test", dtype="float32")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """``copied(folder)``: a copy in the test's own folder, to be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy


@pytest.fixture
def calib() -> Calib:
    """``calib(*arguments)``: the command line in this process; has exit_code, stdout, stderr, exception."""
    from calib.cli.main import app

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def fails(calib: Calib) -> Callable[..., str]:
    """``fails(*arguments)``: stderr of a command that must end as user errors do: exit code 2, a message, nothing on
    stdout, no traceback."""

    def run(*arguments: object) -> str:
        outcome = calib(*arguments)
        assert outcome.exit_code == 2, (outcome.exit_code, outcome.output, outcome.exception)
        assert isinstance(outcome.exception, SystemExit)
        assert outcome.stdout == ""
        assert "error: " in outcome.stderr and "Traceback" not in outcome.stderr
        return " ".join(outcome.stderr.split())

    return run


@pytest.fixture
def command(shapes_set: Path, detector_file: Path) -> Callable[..., list[Any]]:
    """``command(out, *more)``: extraction of the val split in six shards, on the command line."""

    def arguments(out: Path, *more: object) -> list[Any]:
        options = {"detector": f"torchvision:{detector_file}", "annotations": shapes_set / "val.json"}
        options |= {"images": shapes_set / "images", "images-per-shard": 4, "batch-size": 2, "device": "cpu"}
        flat = [x for k, v in options.items() for x in (f"--{k}", v)]
        return ["extract", *flat, "--out", out, *more]

    return arguments


# Where tests run in the background, their processes would inherit that Ctrl-C is ignored.
HEED_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """``start(*arguments, before="")``: the command line as a process of its own; ``before`` is Python run first."""

    def run(*arguments: object, before: str = "") -> subprocess.Popen[str]:
        code = f"{HEED_CTRL_C}\n{before}\nfrom calib.cli.main import app\napp()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """``content(folder)``: every file below it, hidden ones too, by relative name."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a new profile; it is asked for nothing but files and pages of this machine."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    assert all(places), "the report is tested in Chromium: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = str(places[0])
    profile = tmp_path_factory.mktemp("profile")
    switches = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
    switches += ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage")
    for switch in (*switches, f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(places[1])))
    yield driver
    driver.quit()
