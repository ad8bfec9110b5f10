"""A live server process on a free loopback port, and the heads that it serves."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from numpy.typing import NDArray

from calib.artifact import Artifact, HeadInfo, load, save
from calib.heads.linear import LinearClassifier, LinearHead
from calib.layout import TENSORS

FEATURE_SIZE, CLASSES = 32, 6
START_S = 30


def artifact(seed: int, *, cosine: bool = False, detector_logits: bool = False) -> Artifact:
    """A linear head with random weights; its category ids are 3, 5, 7 ..."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES + 1, FEATURE_SIZE, generator=generator)
    scale = torch.tensor([10.0]) if cosine else None
    bias = None if cosine else torch.randn(CLASSES + 1, generator=generator)
    head = LinearHead(LinearClassifier(weight, bias, scale), detector_logits=detector_logits)
    info = HeadInfo(
        method="softmax",
        settings={},
        seed=seed,
        cache_digest="0",
        detector_digest="0",
        category_ids=[3 + 2 * i for i in range(CLASSES)],
        category_names=[f"kind {i}" for i in range(CLASSES)],
        instance_counts=[1] * CLASSES,
        detector={"score_threshold": 0.05, "nms_iou": 0.4, "max_detections": 20, "min_box_side": 0.01},
    )
    return Artifact(head, info)


def damage(version: Path) -> None:
    """Flip one bit of the tensors."""
    content = bytearray((version / TENSORS).read_bytes())
    content[-1] ^= 1
    (version / TENSORS).write_bytes(content)


def write_models(root: Path) -> Path:
    """linear 1, 2, 10; cosine 1; own-logits 1; partly 1, with a damaged 2 and a 3 that is a link outwards."""
    for version in (1, 2, 10):
        save(root / "linear" / str(version), artifact(version))
    save(root / "cosine" / "1", artifact(1, cosine=True))
    save(root / "own-logits" / "1", artifact(1, detector_logits=True))
    save(root / "partly" / "1", artifact(4))
    save(root / "partly" / "2", artifact(5))
    damage(root / "partly" / "2")
    elsewhere = root.with_name("elsewhere")
    save(elsewhere, artifact(6))
    (root / "partly" / "3").symlink_to(elsewhere, target_is_directory=True)
    (root / "notes").mkdir()
    return root


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    models: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def head(self, name: str, version: int) -> LinearHead:
        """The head as the library loads it."""
        head = load(self.models / name / str(version)).head
        assert isinstance(head, LinearHead)
        return head


@contextmanager
def running(models: Path, log: Path, **settings: str) -> Iterator[Server]:
    """``calib serve`` with ``CALIB_SERVE_*`` settings; killed at the end if it still runs."""
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(models), "--port", "0"]
    environment = os.environ | {f"CALIB_SERVE_{k.upper()}": v for k, v in settings.items()}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
    try:
        yield Server(process, _wait(process, log), models, log)
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port, once the server is ready."""
    for _ in range(START_S * 20):
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            try:
                httpx.get(f"{found[0]}/v2/health/ready", timeout=1, trust_env=False).raise_for_status()
            except httpx.TransportError:
                pass
            else:
                return int(found[1])
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not change its models. Every reply with code 500 fails the run."""
    folder = tmp_path_factory.mktemp("server")
    with running(write_models(folder / "models"), folder / "log") as server:
        yield server
        assert "internal error" not in server.log.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    """Triton's own client, unmodified."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain client."""
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture
def features() -> NDArray[np.float32]:
    """[40, D] whose values float16 can hold."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((40, FEATURE_SIZE)).astype(np.float16).astype(np.float32)


@pytest.fixture
def boxes() -> NDArray[np.float32]:
    """[40, 4] that overlap a good deal."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 60, (40, 2))
    return np.hstack([corner, corner + rng.uniform(20, 50, (40, 2))]).astype(np.float32)
