"""uvicorn's HTTP protocol with bounds on what happens before, and after, a request is the application's.

Connections are counted, idle ones included; a request's head has a largest size and a time in which it must arrive, its
body a largest number of pieces; what a client goes on sending after it was refused is read up to a bound, so that it
finds the answer. Whatever is refused here is answered in the common form ``{"error": ...}`` as well.
"""

import json
from asyncio import Transport
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .asgi import Receive, Scope, Send, refuse

MAX_HEAD_BYTES = 64 << 10
MAX_PIECES = 100_000
MAX_DRAINED_BYTES = 256 << 20
_FULL_HEAD_TIMEOUT_S = 1.0
_STOPPING_HEAD_TIMEOUT_S = 1.0


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration with the bounds that ``GuardedProtocol`` reads from it."""

    def __init__(self, app: Any, *, max_connections: int, header_timeout_s: float, **more: Any) -> None:
        super().__init__(app, http=GuardedProtocol, **more)
        self.max_connections, self.header_timeout_s = max_connections, header_timeout_s


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    await refuse(send, 503, "too many connections are open (try again)", {"Retry-After": "1"})


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    config: GuardedConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._in_head, self._had_request, self._is_stopping = True, False, False
        self._head_bytes = self._pieces = self._drained = 0
        self._head_timer: Any = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Beyond the bound on connections requests are answered with 503, and soon."""
        super().connection_made(transport)
        full = len(self.connections) > self.config.max_connections
        if full:
            self.app = _full
        self._await_head(_FULL_HEAD_TIMEOUT_S if full else self.config.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, within the bound on a request's head."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._answer(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """A request begins: its head must arrive in time."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._pieces, self._drained = True, 0, 0, 0
        self._end_wait()
        self._await_head(self.config.header_timeout_s)

    def on_headers_complete(self) -> None:
        """The application takes over."""
        self._in_head, self._had_request = False, True
        self._end_wait()
        super().on_headers_complete()
        if self._is_stopping:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Hand a piece on, or drop it where the answer was given already."""
        self._pieces += 1
        if self.cycle.response_complete:
            self._drained += len(body)
            if self._drained > MAX_DRAINED_BYTES:
                self.transport.close()
        elif self._pieces > MAX_PIECES:
            if not self.cycle.response_started:
                self._answer(400, f"the body came in more than {MAX_PIECES} pieces")
            self.transport.close()
        else:
            super().on_body(body)

    def shutdown(self) -> None:
        """The server is stopping; a connection that was just made may still bring its request."""
        if self._had_request:
            super().shutdown()
            return
        self._is_stopping = True
        self._end_wait()
        self._await_head(_STOPPING_HEAD_TIMEOUT_S)

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP."""
        self._answer(400, msg)

    def _await_head(self, seconds: float) -> None:
        self._head_timer = self.loop.call_later(seconds, self._head_is_late)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._is_stopping:
            self.transport.close()
            return
        self._answer(408, "the request's head did not arrive in time")

    def _answer(self, status: int, text: str) -> None:
        """Answer and close, without the application."""
        if self.transport.is_closing():
            return
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
