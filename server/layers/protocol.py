"""uvicorn's HTTP protocol with bounds on what happens before, and after, a request is the application's.

Connections are counted, idle ones included; a request's head has a largest size and a time in which it must arrive, its
body a largest number of pieces; what a client goes on sending after it was refused is read within bounds, so that it
finds the answer; a client that does not read its answer is left. What is refused here is answered in the common form
``{"error": ...}`` as well.
"""

import json
from asyncio import Transport
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .asgi import Application, Receive, Scope, Send, refuse

MAX_HEAD_BYTES = 64 << 10
MAX_PIECES = 100_000
MAX_DRAINED_BYTES = 256 << 20
_PIECE_FRAMING_BYTES = 24  # size, extension and line ends of a chunk
_FULL_HEAD_TIMEOUT_S = 1.0
_STOPPING_HEAD_TIMEOUT_S = 1.0


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration with the bounds that ``GuardedProtocol`` reads from it. Times are seconds."""

    def __init__(
        self, app: Any, *, max_connections: int, header_timeout_s: float, send_timeout_s: float, **more: Any
    ) -> None:
        super().__init__(app, http=GuardedProtocol, **more)
        self.max_connections = max_connections
        self.header_timeout_s, self.send_timeout_s = header_timeout_s, send_timeout_s


_unsent: set["GuardedProtocol"] = set()  # connections of this process whose clients read slowly


def unsent_bytes() -> int:
    """Bytes of replies that wait for their clients, over all connections of this process."""
    return sum(connection.transport.get_write_buffer_size() for connection in _unsent)


def _refusing(status: int, text: str) -> Application:
    """An application that refuses every request."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(send, status, text, {"Retry-After": "1"} if status == 503 else None)

    return answer


_FULL = _refusing(503, "too many connections are open (try again)")
_LONG_HEAD = _refusing(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    config: GuardedConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._in_head, self._in_body, self._had_request, self._is_stopping = True, False, False, False
        self._head_bytes = self._overhead = self._delivered = self._pieces = self._drained = 0
        self._turned = False  # whether a message began or ended in the bytes at hand
        self._timer: Any = None  # for the head, or for what comes after the answer
        self._send_timer: Any = None

    # The connection

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Beyond the bound on connections requests are answered with 503, and soon."""
        super().connection_made(transport)
        full = len(self.connections) > self.config.max_connections
        if full:
            self.app = _FULL
        self._wait(_FULL_HEAD_TIMEOUT_S if full else self.config.header_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._end_wait()
        self._sent()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server is stopping; a connection that was just made may still bring its request."""
        if self._had_request:
            super().shutdown()
            return
        self._is_stopping = True
        self._wait(_STOPPING_HEAD_TIMEOUT_S, self._head_is_late)

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; bytes that are no content (heads, trailers, what frames chunks) are bounded."""
        self._turned, self._delivered = False, 0
        super().data_received(data)
        self._overhead = 0 if self._turned else self._overhead + len(data) - self._delivered
        if self._overhead > MAX_HEAD_BYTES + _PIECE_FRAMING_BYTES * self._pieces:
            text = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
            self._answer(431 if self._in_head else 400, text if self._in_head else "the body has too much around it")

    def on_message_begin(self) -> None:
        """A request begins: its head must arrive in time."""
        super().on_message_begin()
        self._turned, self._in_head, self._in_body = True, True, False
        self._head_bytes = self._pieces = self._drained = 0
        self._wait(self.config.header_timeout_s, self._head_is_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; what stands behind the body (trailers) is not kept."""
        if self._in_head:
            self._head_bytes += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application takes over."""
        self._in_head, self._in_body, self._had_request = False, True, True
        self._end_wait()
        application = self.app
        if self._head_bytes > MAX_HEAD_BYTES:
            self.app = _LONG_HEAD
        super().on_headers_complete()
        self.app = application
        if self._is_stopping:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Hand a piece on, or drop it where the answer was given already."""
        self._pieces += 1
        self._delivered += len(body)
        if self.cycle.response_complete:
            self._drained += len(body)
            if self._drained > MAX_DRAINED_BYTES:
                self.transport.close()
        elif self._pieces > MAX_PIECES:
            if not self.cycle.response_started:
                self._write(400, f"the body came in more than {MAX_PIECES} pieces")
            self.transport.close()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._turned, self._in_body = True, False
        if self.cycle is not None and self.cycle.response_complete:
            self._end_wait()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Answered; a body that is still coming is read for so long as a head may take."""
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._wait(self.config.header_timeout_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP."""
        self._answer(400, msg)

    # What is sent

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: it must go on reading, though."""
        super().pause_writing()
        _unsent.add(self)
        self._expect_less(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has read nearly all."""
        super().resume_writing()
        self._sent()

    def _expect_less(self, size: int) -> None:
        def check() -> None:
            left = self.transport.get_write_buffer_size()
            self.transport.abort() if left >= size else self._expect_less(left)

        self._send_timer = self.loop.call_later(self.config.send_timeout_s, check)

    def _sent(self) -> None:
        _unsent.discard(self)
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    # Refusals

    def _wait(self, seconds: float, late: Any) -> None:
        self._end_wait()
        self._timer = self.loop.call_later(seconds, late)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        if self._is_stopping:
            self.transport.close()
        else:
            self._answer(408, "the request's head did not arrive in time")

    def _answer(self, status: int, text: str) -> None:
        """Answer and close, without the application; after the answers that are under way."""
        if self.transport.is_closing():
            return
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and not self._in_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if not under_way or not self.cycle.response_started:
            self._write(status, text)
        self.transport.close()

    def _write(self, status: int, text: str) -> None:
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
