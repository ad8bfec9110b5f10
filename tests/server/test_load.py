"""Sixteen clients while versions come and go: no failed and no wrong answer, and memory that stays where it is."""

import logging
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from calib.artifact import save
from calib.client import Client

from .conftest import FEATURE_SIZE, artifact, running
from .test_models import eventually

SECONDS = float(os.environ.get("CALIB_LOAD_SECONDS", "20"))
CLIENTS, ROWS = 16, 1000
_log = logging.getLogger(__name__)
GROWTH_MB = 64  # allowed after warm-up: replies under way, and what the allocator keeps


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def asked() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((ROWS, FEATURE_SIZE)).astype(np.float32)


@pytest.mark.slow
def test_every_answer_is_right_while_versions_are_reloaded(tmp_path: Path) -> None:
    for version in (1, 2):
        save(tmp_path / "models" / "head" / str(version), artifact(version))
    features = asked()
    wanted = {v: artifact(v).head.scores(torch.from_numpy(features)).detach().numpy() for v in (1, 2)}
    answers: Counter[int] = Counter()
    wrong: list[str] = []
    stop = threading.Event()

    def ask(client_number: int, url: str) -> None:
        tensor = {"name": "FEATURES", "datatype": "FP32", "shape": [ROWS, FEATURE_SIZE]}
        described = tensor | {"parameters": {"binary_data_size": features.nbytes}}
        header = httpx.Request("POST", url, json={"inputs": [described], "parameters": {"binary_data_output": True}})
        body = header.read() + features.tobytes()
        length = {"Inference-Header-Content-Length": str(len(header.content))}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            while not stop.is_set():
                reply = http.post("/v2/models/head/infer", content=body, headers=length)
                if reply.status_code != 200:
                    wrong.append(f"{reply.status_code} {reply.text[:200]}")
                    continue
                at = int(reply.headers["Inference-Header-Content-Length"])
                version = int(httpx.Response(200, content=reply.content[:at]).json()["model_version"])
                scores = np.frombuffer(reply.content, np.float32, offset=at).reshape(ROWS, -1)
                answers[version] += 1
                if not np.array_equal(scores, wanted[version]):
                    wrong.append(f"client {client_number}: not the scores of version {version}")

    with running(tmp_path / "models", tmp_path / "log") as server:
        threads = [threading.Thread(target=ask, args=(k, server.url)) for k in range(CLIENTS)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http:
            slowest, memory = 0.0, []
            until = time.monotonic() + SECONDS
            for k in range(10**6):
                action = "unload" if k % 2 else "load"
                assert http.post(f"/v2/repository/models/head/versions/2/{action}", json={}).status_code == 200
                begun = time.monotonic()
                assert http.get("/v2/health/live").status_code == 200
                slowest = max(slowest, time.monotonic() - begun)
                memory.append(resident_mb(server.process.pid))
                if time.monotonic() > until:
                    break
                time.sleep(1)
        stop.set()
        for thread in threads:
            thread.join()
        log = server.log.read_text()
    assert not wrong, wrong[:3]
    assert answers[1] > 10 and answers[2] > 10, answers
    warm = max(memory[: max(len(memory) // 3, 1)])
    assert memory[-1] < warm + GROWTH_MB, memory
    assert "internal error" not in log
    _log.info("%d answers, slowest health %.0f ms, %.0f MB", answers.total(), 1000 * slowest, memory[-1])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_was_accepted_before_a_stop_is_answered(tmp_path: Path, workers: str) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    features = asked()
    wanted = artifact(1).head.scores(torch.from_numpy(features)).detach().numpy()
    outcomes: Counter[str] = Counter()

    def ask(url: str) -> None:
        for _ in range(1000):
            # A connection for each request: what cannot connect any more was not accepted.
            with Client(url, trust_env=False) as client:
                try:
                    scores = client.scores("head", features)
                except Exception as e:
                    # With several workers, what no worker has taken in when the last one stops may be reset.
                    kinds = (httpx.ConnectError, httpx.ReadError) if workers != "1" else httpx.ConnectError
                    refused = isinstance(e.__cause__, kinds)
                    outcomes["refused" if refused else f"failed: {e!r}"] += 1
                    return
            outcomes["right" if np.array_equal(scores, wanted) else "wrong"] += 1

    with running(tmp_path / "models", tmp_path / "log", processes=workers) as server:
        assert eventually(lambda: server.log.read_text().count("startup complete") == int(workers))
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while outcomes["right"] < 40:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(30) == 0
    assert set(outcomes) == {"right", "refused"} and outcomes["refused"] == 8, outcomes
