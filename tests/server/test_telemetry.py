"""Spans reach a collector, with what the access log says of a request; nothing is sent unless it is switched on."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from calib.artifact import save

from .conftest import artifact, running
from .test_models import ONES


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """The address of an OTLP receiver and what it received."""
    received: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{receiver.server_port}/v1/traces", received
        receiver.shutdown()


@pytest.mark.parametrize("on", [True, False])
def test_spans_of_requests(
    tmp_path: Path, collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    url, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url)
    save(tmp_path / "models" / "head" / "1", artifact(1))
    with running(tmp_path / "models", tmp_path / "log", telemetry=str(on)) as server:
        assert httpx.post(f"{server.url}/v2/models/head/infer", json=ONES, trust_env=False).status_code == 200
        server.process.terminate()  # the last spans are sent at the end
        assert server.process.wait(30) == 0
    spans = [
        {one.key: one.value for one in span.attributes}
        for body in received
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert len(spans) == on, "health is not traced"
    if on:
        assert spans[0]["calib.model"].string_value == "head" and spans[0]["calib.rows"].int_value == 1
        assert spans[0]["calib.compute_ms"].double_value > 0
