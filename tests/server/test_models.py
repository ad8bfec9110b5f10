"""Versions: loaded and unloaded one by one, pinned, watched; TLS with certificates of both sides."""

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import httpx
import pytest
import trustme

from calib.artifact import save
from calib.errors import UnknownNameError
from calib.layout import DESCRIPTION, TENSORS
from calib.server.errors import NotServedError
from calib.server.models import Repository

from .conftest import FEATURE_SIZE, Server, artifact, damage, running

ONES = {"inputs": [{"name": "FEATURES", "datatype": "FP32", "shape": [1, FEATURE_SIZE], "data": [1] * FEATURE_SIZE}]}


@contextmanager
def serving(tmp_path: Path, **settings: str) -> Iterator[tuple[Server, httpx.Client]]:
    for version in (1, 2):
        save(tmp_path / "models" / "head" / str(version), artifact(version))
    with (
        running(tmp_path / "models", tmp_path / "log", **settings) as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        yield server, http


def default(http: httpx.Client) -> str:
    reply = http.post("/v2/models/head/infer", json=ONES)
    return str(reply.json()["model_version"]) if reply.status_code == 200 else str(reply.json()["error"])


def eventually(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    for _ in range(int(seconds * 20)):
        if is_so():
            return True
        time.sleep(0.05)
    return False


def test_versions_are_loaded_and_unloaded_one_by_one(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, http):
        versions = "/v2/repository/models/head/versions"
        assert default(http) == "2"
        assert http.post(f"{versions}/2/unload", json={}).status_code == 200
        assert default(http) == "1"
        save(tmp_path / "models" / "head" / "7", artifact(7))
        assert http.post(f"{versions}/7/load", json={}).status_code == 200
        assert default(http) == "7"
        states = {row["version"]: row["state"] for row in http.post("/v2/repository/index").json()}
        assert states == {"1": "READY", "2": "UNAVAILABLE", "7": "READY"}
        assert http.post(f"{versions}/2/load", json={}).status_code == 200
        for action in ("load", "unload"):
            for version in ("9", "x", "%2e%2e%2f1", "-1"):
                assert http.post(f"{versions}/{version}/{action}", json={}).status_code == 404


def test_a_pinned_version_answers_by_default(tmp_path: Path) -> None:
    with serving(tmp_path, pinned="head=1") as (_, http):
        assert default(http) == "1"
        assert http.post("/v2/models/head/versions/2/infer", json=ONES).json()["model_version"] == "2"
        assert http.post("/v2/repository/models/head/versions/1/unload", json={}).status_code == 200
        assert "version 1 of model 'head' is not loaded" in default(http)


def test_a_watched_folder_is_served_as_it_is(tmp_path: Path) -> None:
    with serving(tmp_path, watch_s="0.1") as (server, http):
        assert default(http) == "2"
        save(tmp_path / "models" / "head" / "3", artifact(3))
        save(tmp_path / "models" / "new" / "1", artifact(4))
        assert eventually(lambda: default(http) == "3")
        assert eventually(lambda: http.get("/v2/models/new/ready").status_code == 200)
        damage(tmp_path / "models" / "head" / "3")
        assert eventually(lambda: "damaged" in server.log.read_text())
        assert default(http) == "3"  # what was loaded goes on
        rmtree(tmp_path / "models" / "new")
        assert eventually(lambda: http.get("/v2/models/new/ready").status_code == 404)


def test_a_look_finds_nothing_when_nothing_changed(tmp_path: Path) -> None:
    save(tmp_path / "head" / "1", artifact(1))
    repository = Repository(tmp_path)
    assert repository.refresh() == []
    save(tmp_path / "head" / "2", artifact(2))
    assert repository.refresh() == ["head"] and repository.refresh() == []
    repository.unload("head", "2")
    assert repository.refresh() == [] and repository.find("head").version == 1
    with pytest.raises(NotServedError):
        repository.load("head", "../1")
    with pytest.raises(UnknownNameError):
        repository.load("other", "1")


@pytest.mark.parametrize("how", ["in place", "renamed", "folder"])
def test_a_replacement_of_equal_size_and_time_is_noticed(tmp_path: Path, how: str) -> None:
    version = tmp_path / "models" / "head" / "1"
    save(version, artifact(1))
    save(tmp_path / "other", artifact(2))
    for part in (DESCRIPTION, TENSORS):
        before, after = (version / part).stat(), tmp_path / "other" / part
        assert after.stat().st_size == before.st_size
        os.utime(after, ns=(before.st_atime_ns, before.st_mtime_ns))
    repository = Repository(tmp_path / "models")
    if how == "folder":
        rmtree(version)
        (tmp_path / "other").rename(version)
    for part in (DESCRIPTION, TENSORS) if how != "folder" else ():
        other, time_ns = tmp_path / "other" / part, (version / part).stat().st_mtime_ns
        if how == "renamed":
            other.rename(version / part)
        else:
            (version / part).write_bytes(other.read_bytes())
            os.utime(version / part, ns=(time_ns, time_ns))
    assert repository.refresh() == ["head"] and repository.refresh() == []
    assert repository.find("head").info.seed == 2 and repository.index()[0]["state"] == "READY"


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.crt"))
    for name, issued in (("server", authority.issue_cert("127.0.0.1")), ("client", authority.issue_cert("client"))):
        issued.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.crt"))
    save(tmp_path / "models" / "head" / "1", artifact(1))
    settings = {
        "CALIB_SERVE_SSL_CERTFILE": str(tmp_path / "server.crt"),
        "CALIB_SERVE_SSL_KEYFILE": str(tmp_path / "server.key"),
        "CALIB_SERVE_SSL_CA_CERTS": str(tmp_path / "authority.crt"),
    }
    log = tmp_path / "log"
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(tmp_path / "models"), "--port", "0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=os.environ | settings)
    try:
        assert eventually(lambda: "startup complete" in log.read_text() or process.poll() is not None)
        url = next(word for word in log.read_text().split() if word.startswith("https://127.0.0.1:"))
        known = ssl.create_default_context(cafile=str(tmp_path / "authority.crt"))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/v2/health/live", verify=known, trust_env=False)
        known.load_cert_chain(str(tmp_path / "client.crt"), str(tmp_path / "client.key"))
        assert httpx.get(f"{url}/v2/health/live", verify=known, trust_env=False).status_code == 200
    finally:
        process.kill()
        process.wait()


def test_half_a_certificate_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    (tmp_path / "server.crt").touch()
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(tmp_path / "models"), "--port", "0"]
    for name, said in (("server.crt", "TLS needs"), ("absent.crt", "not found")):
        environment = os.environ | {"CALIB_SERVE_SSL_CERTFILE": str(tmp_path / name)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
