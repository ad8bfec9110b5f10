"""OpenTelemetry spans of requests, for those who switch them on (``telemetry``; extra ``telemetry``).

Where they go is set by the standard variables, for example OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_SERVICE_NAME.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

from fastapi import FastAPI

from calib.errors import MissingExtraError

from .asgi import Application, Receive, Scope, Send


def trace(app: FastAPI) -> Callable[[], None]:
    """Send a span for every request but those for health and metrics; returns what sends the last ones at the end.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace as api
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError("opentelemetry", "telemetry") from None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    api.set_tracer_provider(provider)
    app.add_middleware(_Recorded, api=api)
    app.add_middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        excluded_urls="v2/health/.*,metrics",
        exclude_spans=["receive", "send"],
    )
    return provider.shutdown


class _Recorded:
    """Puts what the access log says of a request (model, version, rows, milliseconds) on its span."""

    def __init__(self, app: Application, api: Any) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def recorded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":  # the span ends with the response
                record = scope.get("state", {}).get("record", {})
                self._api.get_current_span().set_attributes({f"calib.{name}": value for name, value in record.items()})
            await send(message)

        await self._app(scope, receive, recorded)
