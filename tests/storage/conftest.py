"""A real S3 server in a process of its own, a proxy before it, and a bucket and a mirror for every test.

Tests with ``on_both`` run on an emulator of Google Cloud Storage too.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from calib.storage import Remote, parse

from .proxy import Proxy


@contextmanager
def running(program: str, **more: Any) -> Iterator[int]:
    """The port of a server of this folder, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(program))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)
    assert server.stdin and server.stdout
    before = dict(os.environ)
    yield int(server.stdout.readline())
    os.environ.clear()
    os.environ.update(before)
    server.stdin.close()
    assert server.wait(20) == 0
    server.stdout.close()


@pytest.fixture(scope="session")
def _proxy() -> Iterator[Proxy]:
    for package in ("s3fs", "moto"):
        pytest.importorskip(package)
    with running("s3_server.py") as port:
        proxy = Proxy(port)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_ACCESS_KEY_ID": "the-id",
            "AWS_SECRET_ACCESS_KEY": "the-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield proxy
        proxy.close()


@pytest.fixture(scope="session")
def _gs() -> Iterator[None]:
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package)
    with running("gs_server.py", stderr=subprocess.DEVNULL) as port:
        os.environ |= {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of the bucket, which the emulator lacks
            "GOOGLE_CLOUD_PROJECT": "project",
        }
        yield


@pytest.fixture
def proxy(_proxy: Proxy) -> Iterator[Proxy]:
    """Calm again after the test."""
    yield _proxy
    _proxy.calm()
    _proxy.cuts = 0


_numbers = itertools.count()


on_both = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a new bucket, as a URL; the mirror lies in the test's own folder."""
    protocol = getattr(request, "param", "s3")
    request.getfixturevalue("proxy" if protocol == "s3" else "_gs")
    monkeypatch.setenv("CALIB_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("CALIB_LEASE_SECONDS", "1")
    name = f"bucket-{next(_numbers)}"
    at(f"{protocol}://{name}/x").fs.mkdir(name)
    return f"{protocol}://{name}/place"


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
