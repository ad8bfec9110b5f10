"""``GET /metrics``: Prometheus text, named as Triton's metrics under our own prefix.

Counters of a version are those of its statistics; a version that is loaded again begins at 0, as a restarted one does.
Each server process counts for itself.
"""

from collections import Counter
from collections.abc import Iterable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .access import Application, Receive, Scope, Send
from .engine import Engine
from .models import Repository

_DURATIONS = {
    "success": "request",
    "queue": "queue",
    "compute_input": "compute_input",
    "compute_infer": "compute_infer",
    "compute_output": "compute_output",
}
_LABELS = ["model", "version"]


class Answers:
    """Replies by status, and bytes in and out, of the whole process."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self.bytes_in = 0
        self.bytes_out = 0


class Counting:
    """An ASGI layer that counts replies by status and the bytes of their bodies."""

    def __init__(self, app: Application, answers: Answers) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._answers.by_status[message["status"]] += 1
            elif message["type"] == "http.response.body":
                self._answers.bytes_out += len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, counted)


class _Serving(Collector):
    def __init__(self, repository: Repository, engine: Engine, answers: Answers) -> None:
        self._repository, self._engine, self._answers = repository, engine, answers

    def collect(self) -> Iterable[Metric]:
        """All metrics as they stand now."""
        yield from self._of_models()
        answers = CounterMetricFamily("calib_http_responses", "replies by status", labels=["code"])
        for status, count in sorted(self._answers.by_status.items()):
            answers.add_metric([str(status)], count)
        yield answers
        yield CounterMetricFamily("calib_request_bytes", "bytes of bodies received", value=self._answers.bytes_in)
        yield CounterMetricFamily("calib_response_bytes", "bytes of bodies sent", value=self._answers.bytes_out)
        yield GaugeMetricFamily("calib_pending_requests", "accepted and not yet answered", value=self._engine.pending)

    def _of_models(self) -> Iterable[Metric]:
        success = CounterMetricFamily("calib_inference_request_success", "answered requests", labels=_LABELS)
        failure = CounterMetricFamily(
            "calib_inference_request_failure", "refused requests", labels=[*_LABELS, "reason"]
        )
        rows = CounterMetricFamily("calib_inference_count", "proposals scored", labels=_LABELS)
        loaded = GaugeMetricFamily("calib_model_loaded", "versions that can be asked", labels=_LABELS)
        durations = {
            field: CounterMetricFamily(f"calib_inference_{name}_duration_us", f"microseconds: {name}", labels=_LABELS)
            for field, name in _DURATIONS.items()
        }
        for model in self._repository.loaded():
            labels, s = [model.name, str(model.version)], model.statistics
            success.add_metric(labels, s.success.count)
            rows.add_metric(labels, s.rows)
            loaded.add_metric(labels, 1)
            for reason, count in sorted(s.reasons.items()):
                failure.add_metric([*labels, reason], count)
            for field, family in durations.items():
                family.add_metric(labels, getattr(s, field).ns // 1000)
        yield from (success, failure, rows, loaded, *durations.values())


def registry(repository: Repository, engine: Engine, answers: Answers) -> CollectorRegistry:
    """What ``text`` prints."""
    made = CollectorRegistry()
    made.register(_Serving(repository, engine, answers))
    return made


def text(made: CollectorRegistry) -> bytes:
    """Prometheus' text format."""
    return generate_latest(made)
