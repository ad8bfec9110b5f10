"""A JSON line on stderr per answered request, and a request id in every reply.

The id is that of the header X-Request-Id where it is a plain word, else a new one. What was computed (model, version,
rows, milliseconds in the queue, computing and writing) is added by the routes.
"""

import logging
import re
import sys
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

import orjson

from .asgi import Application, Receive, Scope, Send

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_log = logging.getLogger("calib.access")


def enable() -> None:
    """Send the lines to stderr as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers, _log.propagate = [handler], False
    _log.setLevel(logging.INFO)


class AccessLog:
    """An ASGI layer around everything else."""

    def __init__(self, app: Application, enabled: bool) -> None:
        self._app, self._enabled = app, enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        start, seen = time.perf_counter(), {"status": 0, "bytes_out": 0}

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                seen["bytes_out"] += len(message.get("body", b""))
            await send(message)

        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            await self._app(scope, receive, noted)
        finally:
            if self._enabled:
                line = {"time": round(time.time(), 3), "id": request_id, "method": scope["method"]}
                line |= {"path": scope["path"][:256], **seen, **state.get("record", {})}
                line["total_ms"] = round(1000 * (time.perf_counter() - start), 3)
                _log.info(orjson.dumps(line).decode())


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
