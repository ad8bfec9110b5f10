"""What ``serving.py`` measures: servers with a request to each, and matrix products in a process of their own."""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from _serving_environments import PACKAGES, Environment, bentoml, litserve, mlserver
from _serving_process import Connection, Launch, Process
from _serving_work import DETECTIONS, NMS, TOP, TOPK, Check, Work, expect_ok

FLOOR = Path(__file__).with_name("_serving_floor.py")


@dataclass(frozen=True)
class Case:
    """A configuration: a server and the request to it. An ``optional`` server may fail to start."""

    name: str
    launch: Launch
    request: bytes
    check: Check
    optional: bool = False


class Product:
    """The matrix product in a process that is told how often."""

    def __init__(self, process: Process) -> None:
        self.process, self.reply_bytes = process, 0

    def warm(self) -> None:
        """One call that does not count."""
        self.run(1)

    def run(self, requests: int) -> list[float]:
        """Seconds of each call."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{requests}\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))


class Served:
    """A request to a server, again and again."""

    def __init__(self, process: Process, port: int, request: bytes, check: Check) -> None:
        self.process, self._connection, self._request = process, Connection(port), request
        reply = self._connection.ask(request)
        check(reply)
        self.reply_bytes = len(reply.body)

    def warm(self) -> None:
        """One request that does not count, on a new connection: servers close those that idle for seconds."""
        self._connection.close()
        self.run(1)

    def run(self, requests: int) -> list[float]:
        """Seconds of each request."""
        taken = []
        for _ in range(requests):
            begun = time.perf_counter()
            reply = self._connection.ask(self._request)
            taken.append(time.perf_counter() - begun)
            expect_ok(reply)
        return taken


def product(folder: Path, *, bf16: bool = False) -> list[str]:
    """The command of a process for a ``Product``."""
    return [sys.executable, str(FLOOR), "product", str(folder / "head.npz"), *(["--bf16"] if bf16 else [])]


def ours(work: Work, folder: Path) -> list[Case]:
    """``calib serve`` in its forms."""
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(folder / "models"), "--port", "0"]
    launch = Launch(command, {}, "/v2/health/ready")
    in_bf16 = Launch(command, {"CALIB_SERVE_PRECISION": "bf16"}, "/v2/health/ready")
    nms = {name: getattr(NMS, name) for name in NMS.__dataclass_fields__}
    scores = ("SCORES",)
    return [
        Case("calib dense", launch, work.infer(scores, {}), work.dense),
        Case("calib dense, FP16 out", launch, work.infer(scores, {"score_dtype": "FP16"}), work.half),
        Case("calib dense, bf16", in_bf16, work.infer(scores, {}), work.bf16),
        Case("calib top-300", launch, work.infer(TOP, {"topk": TOPK}), work.top),
        Case("calib detections", launch, work.infer(DETECTIONS, nms, boxes=True), work.detections),
        Case("calib Arrow", launch, work.arrow(), work.arrow_detections),
        Case("calib JSON", launch, work.infer_json(), partial(work.scores_in_json, exactly=True)),
    ]


def empty(work: Work) -> Case:
    """The server that computes nothing."""
    launch = Launch([sys.executable, str(FLOOR), "empty", str(work.scores.nbytes)], {}, "/")
    return Case("empty", launch, work.raw("/"), expect_ok)


def peers(work: Work, folder: Path, environments: dict[str, Environment]) -> list[Case]:
    """The others, each in its environment."""
    bento, lit, ml = (environments[package] for package in PACKAGES)
    raw, zipped = work.scores_in_bytes, {"Accept-Encoding": "gzip"}
    cases = [
        Case("BentoML API", bentoml(bento, folder), work.raw("/scores"), raw),
        Case("BentoML mounted", bentoml(bento, folder), work.raw("/mounted/"), raw),
        Case("LitServe", litserve(lit, folder, fast_queue=False), work.raw("/predict"), raw),
        Case("LitServe fast queue", litserve(lit, folder, fast_queue=True), work.raw("/predict"), raw),
        Case("MLServer", mlserver(ml, folder, gzip=True), work.infer_json(zipped), work.scores_in_json),
        Case("MLServer, no gzip", mlserver(ml, folder, gzip=False), work.infer_json(zipped), work.scores_in_json),
    ]
    return [Case(c.name, c.launch, c.request, c.check, optional=True) for c in cases]
