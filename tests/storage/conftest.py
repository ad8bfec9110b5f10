"""A real S3 server in a process of its own, a proxy before it, and a bucket and a mirror for every test."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calib.storage import Remote, parse

from .proxy import Proxy


@pytest.fixture(scope="session")
def _proxy() -> Iterator[Proxy]:
    for package in ("s3fs", "moto"):
        pytest.importorskip(package)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin and server.stdout
    proxy = Proxy(int(server.stdout.readline()))
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "the-id",
        "AWS_SECRET_ACCESS_KEY": "the-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield proxy
    os.environ.clear()
    os.environ.update(before)
    proxy.close()
    server.stdin.close()
    assert server.wait(20) == 0
    server.stdout.close()


@pytest.fixture
def proxy(_proxy: Proxy) -> Iterator[Proxy]:
    """Calm again after the test."""
    yield _proxy
    _proxy.calm()
    _proxy.cuts = 0


_numbers = itertools.count()


@pytest.fixture
def bucket(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a new bucket, as a URL; the mirror lies in the test's own folder."""
    monkeypatch.setenv("CALIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("CALIB_LEASE_SECONDS", "1")
    name = f"bucket-{next(_numbers)}"
    at(f"s3://{name}/x").fs.mkdir(name)
    return f"s3://{name}/place"


def at(url: str) -> Remote:
    place = parse(url)
    assert isinstance(place, Remote)
    return place


@pytest.fixture
def remote() -> Callable[[str], Remote]:
    """``remote(url)``."""
    return at


@pytest.fixture
def stored() -> Callable[[str], dict[str, bytes]]:
    """``stored(url)``: every object below it, by relative name."""

    def read(url: str) -> dict[str, bytes]:
        place = at(url)
        return {k.removeprefix(f"{place.path}/"): place.fs.cat_file(k) for k in place.fs.find(place.path)}

    return read


@pytest.fixture
def put() -> Callable[[Path, str], str]:
    """``put(folder, url)``: store a local folder as it is; the URL."""

    def upload(folder: Path, url: str) -> str:
        place: Any = at(url)
        for file in folder.rglob("*"):
            if file.is_file() and not file.name.startswith("."):
                place.fs.put_file(str(file), f"{place.path}/{file.relative_to(folder)}")
        return url

    return upload
