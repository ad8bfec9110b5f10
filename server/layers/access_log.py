"""A JSON line on stderr per answered request, and a request id in every reply.

The id is that of the header X-Request-Id where it is a plain word, else a new one. What was computed (model, version,
rows, milliseconds in the queue, computing and writing) is added by the routes.
"""

import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import orjson

from .asgi import Application, Receive, Scope, Send

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_MAX_LINES = 10_000  # that wait for stderr
_FLUSH_S = 1.0
_STDERR = 2
_log = logging.getLogger("calib.access")


class Lines(logging.Handler):
    """Writes to stderr in a thread of its own: where nobody reads it, lines are dropped and counted, and none waits."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(_MAX_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name="calib-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line into the queue."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait until all is written, but not long: at the end of the process nobody may read any more."""
        end = time.monotonic() + _FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with self.lock or nullcontext():  # held in emit, too
                dropped, self._dropped = self._dropped, 0
            text = f"{line}\n" + (f"{dropped} lines of the log were dropped\n" if dropped else "")
            rest = memoryview(text.encode(errors="backslashreplace"))
            try:
                while rest:
                    rest = rest[os.write(_STDERR, rest) :]
            except OSError:  # nobody will ever read it
                pass
            self._lines.task_done()


def enable() -> None:
    """Send the lines to stderr as they are."""
    handler = Lines()
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
