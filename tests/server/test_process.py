"""The server as a process: starting, reloading, health under load, stopping; the command line around it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from calib.artifact import save
from calib.cli.main import app

from .conftest import FEATURE_SIZE, Server, artifact, damage, running

ONES = {"inputs": [{"name": "FEATURES", "datatype": "FP32", "shape": [1, FEATURE_SIZE], "data": [1] * FEATURE_SIZE}]}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "calib.cli", "serve", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def scores_of(version: int) -> list[float]:
    head = artifact(version).head
    with torch.inference_mode():
        scores: list[float] = head.scores(torch.ones(1, FEATURE_SIZE))[0].tolist()
    return scores


def answer(http: httpx.Client, version: str = "") -> tuple[str, list[float]]:
    path = f"/versions/{version}" if version else ""
    reply = http.post(f"/v2/models/head{path}/infer", json=ONES).raise_for_status().json()
    return reply["model_version"], np.array(reply["outputs"][0]["data"], np.float32).tolist()


def test_load_and_unload(tmp_path: Path) -> None:
    models = tmp_path / "models"
    save(models / "head" / "1", artifact(1))
    with (
        running(models, tmp_path / "log") as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        load, unload = "/v2/repository/models/head/load", "/v2/repository/models/head/unload"
        assert answer(http) == ("1", scores_of(1))
        save(models / "head" / "2", artifact(2))
        assert answer(http)[0] == "1"
        assert http.post(load, json={}).status_code == 200
        assert answer(http) == ("2", scores_of(2))

        damage(models / "head" / "2")
        refused = http.post(load, json={})
        assert refused.status_code == 400 and "damaged" in refused.json()["error"]
        assert answer(http) == ("2", scores_of(2)), "a damaged file must not end what is served"

        save(models / "head" / "2", artifact(3), overwrite=True)
        assert http.post(load).status_code == 200
        assert answer(http) == ("2", scores_of(3))

        assert http.post(unload, json={"parameters": {"unload_dependents": False}}).status_code == 200
        assert http.get("/v2/models/head").status_code == 404
        gone = http.get("/v2/health/ready")
        assert gone.status_code == 503 and list(gone.json()) == ["error"]
        assert http.get("/v2/health/live").status_code == 200
        assert http.post("/v2/repository/index", json={"ready": True}).json() == []
        assert http.post(load).status_code == 200
        assert answer(http, "1") == ("1", scores_of(1))


def test_health_answers_and_replies_stay_whole_while_many_ask_and_models_are_reloaded(server: Server) -> None:
    features = np.random.default_rng(0).standard_normal((20_000, FEATURE_SIZE)).astype(np.float32)
    header = f'{{"inputs":[{{"name":"FEATURES","datatype":"FP32","shape":[20000,{FEATURE_SIZE}],"parameters":'
    header += f'{{"binary_data_size":{features.nbytes}}}}}],"parameters":{{"binary_data_output":true}}}}'
    wanted = server.head("linear", 10).scores(torch.from_numpy(features)).numpy()
    wrong: list[str] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
            for _ in range(4):
                length = {"Inference-Header-Content-Length": str(len(header))}
                reply = http.post(
                    "/v2/models/linear/infer", content=header.encode() + features.tobytes(), headers=length
                )
                start = int(reply.headers.get("Inference-Header-Content-Length", -1))
                if start % 64 or not np.array_equal(np.frombuffer(reply.content[start:], np.float32), wanted.ravel()):
                    wrong.append(reply.text[:200])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    health = []
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        while any(thread.is_alive() for thread in threads):
            health.append(http.get("/v2/health/ready").elapsed.total_seconds())
            http.post("/v2/repository/models/linear/load").raise_for_status()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(health) >= 3 and np.median(health) < 0.2


def test_sigterm_finishes_what_was_accepted_and_exits_0(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    with running(tmp_path / "models", tmp_path / "log") as server:
        body = b'{"inputs":[{"name":"FEATURES","datatype":"FP32","shape":[0,32],"data":[]}]}'

        def slowly() -> Iterator[bytes]:
            yield body[:20]
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(0.5)
            yield body[20:]

        reply = httpx.post(f"{server.url}/v2/models/head/infer", content=slowly(), timeout=20, trust_env=False)
        assert reply.status_code == 200 and reply.json()["outputs"][0]["shape"] == [0, 6]
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


def test_check_lists_the_models_and_tells_by_its_code(server: Server, tmp_path: Path) -> None:
    with_damage = CliRunner().invoke(app, ["serve", "--models", str(server.models), "--check"])
    assert with_damage.exit_code == 1
    assert "linear  10  READY" in with_damage.stdout and "partly  2  UNAVAILABLE" in with_damage.stdout
    save(tmp_path / "head" / "1", artifact(1))
    assert CliRunner().invoke(app, ["serve", "--models", str(tmp_path), "--check"]).exit_code == 0


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("absent", "model folder not found"),
        ("empty", "calib train METHOD"),
        ("models/head", "give the folder of all models"),
        ("models/head/1", "give the folder of all models"),
        ("models/head/1/head.json", "is not a folder"),
    ],
)
def test_a_folder_without_models_is_an_error_with_a_next_step(tmp_path: Path, folder: str, text: str) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "models" / "head" / "1", artifact(1))
    result = CliRunner().invoke(app, ["serve", "--models", str(tmp_path / folder), "--check"])
    assert result.exit_code == 2 and text in result.stderr
    if folder.startswith("models/head"):
        assert str(tmp_path / "models") in result.stderr


def test_a_server_without_any_usable_model_does_not_start(tmp_path: Path) -> None:
    save(tmp_path / "head" / "1", artifact(1))
    damage(tmp_path / "head" / "1")
    result = command("--models", str(tmp_path), "--port", "0")
    assert result.returncode == 2 and "damaged" in result.stderr, result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr


def test_a_port_in_use_and_a_wrong_setting_are_errors(server: Server) -> None:
    models = ("--models", str(server.models))
    taken = command(*models, "--port", str(server.port))
    assert taken.returncode == 2 and "cannot listen" in taken.stderr and "Traceback" not in taken.stderr
    wrong = command(*models, "--port", "0", CALIB_SERVE_MAX_ROWS="many")
    assert wrong.returncode == 2 and "CALIB_SERVE_MAX_ROWS" in wrong.stderr and "Traceback" not in wrong.stderr
