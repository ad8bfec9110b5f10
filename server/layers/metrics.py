"""``GET /metrics``: Prometheus text, named as Triton's metrics under our own prefix, over all workers.

Counters of a version are those of its statistics; a version that is loaded again begins at 0, as a restarted one does.
"""

from collections import Counter
from collections.abc import Iterable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..service import Answers, Service
from .asgi import Application, Receive, Scope, Send

_DURATIONS = {
    "success": "request",
    "queue": "queue",
    "compute_input": "compute_input",
    "compute_infer": "compute_infer",
    "compute_output": "compute_output",
}
_LABELS = ["model", "version"]


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
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """All metrics as they stand now."""
        yield from self._of_models()
        counters = self._service.counters()
        by_status: Counter[str] = Counter()
        for one in counters:
            by_status.update(one["by_status"])
        answers = CounterMetricFamily("calib_http_responses", "replies by status", labels=["code"])
        for status, count in sorted(by_status.items()):
            answers.add_metric([status], count)
        yield answers
        sums = {name: sum(one[name] for one in counters) for name in ("bytes_in", "bytes_out", "pending")}
        yield CounterMetricFamily("calib_request_bytes", "bytes of bodies received", value=sums["bytes_in"])
        yield CounterMetricFamily("calib_response_bytes", "bytes of bodies sent", value=sums["bytes_out"])
        yield GaugeMetricFamily("calib_pending_requests", "accepted and not yet answered", value=sums["pending"])

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
        models = self._service.repository.loaded()
        for model, s in zip(models, self._service.statistics(models), strict=True):
            labels = [model.name, str(model.version)]
            success.add_metric(labels, s.success.count)
            rows.add_metric(labels, s.rows)
            loaded.add_metric(labels, 1)
            for reason, count in sorted(s.reasons.items()):
                failure.add_metric([*labels, reason], count)
            for field, family in durations.items():
                family.add_metric(labels, getattr(s, field).ns // 1000)
        yield from (success, failure, rows, loaded, *durations.values())


def registry(service: Service) -> CollectorRegistry:
    """What ``text`` prints."""
    made = CollectorRegistry()
    made.register(_Serving(service))
    return made


def text(made: CollectorRegistry) -> bytes:
    """Prometheus' text format."""
    return generate_latest(made)
