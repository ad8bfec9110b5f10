"""uvicorn's HTTP/1.1 protocol on h11, with bounds on what one client can make the process wait for, or keep in memory.

h11 stops at the end of a request until it is answered, so nothing that follows is looked at before, and ``Upgrade`` is
an ordinary header to it. What is awaited of a client is one of a few phases. Each has a time that begins when the phase
does, and again only when the client completed something (``STEP`` bytes of a body, a piece of a reply): single bytes
buy no time. When connections or memory run out, the client that has kept us waiting longest is left first. Refusals
have the common form ``{"error": ...}``.
"""

import json
import sys
from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..serve_settings import ServeSettings
from .asgi import Application, Receive, Scope, Send, refuse

STEP = 64 << 10  # bytes of a body that must come within header_timeout_s
PATIENCE_S = 1.0  # who keeps us waiting longer may be left where connections or memory run out
_LINGER_S, _LINGER_BYTES = 2.0, 8 << 20  # what is read and dropped after the last answer, but for the rest of a body
_EVENTS_PER_TURN = 1000  # pieces of a body that are parsed before other connections have their turn


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration with the settings whose bounds ``GuardedProtocol`` holds."""

    def __init__(self, app: Any, settings: ServeSettings, **more: Any) -> None:
        super().__init__(app, http=GuardedProtocol, timeout_keep_alive=settings.keep_alive_s, **more)
        self.settings = settings


def _refusing(status: int, text: str) -> Application:
    """An application that refuses every request."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(send, status, text, {"Retry-After": "1", "Connection": "close"})

    return answer


_FULL = _refusing(503, "too many connections are open (try again)")


class _Parser(h11.Connection):
    """Refuses heads with too many bytes or lines, and bodies in too many pieces; lets others have their turn."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(h11.SERVER, settings.max_head_bytes)
        self._settings = settings
        self.requests = self._pieces = 0
        self.left = _EVENTS_PER_TURN

    def next_event(self) -> Any:
        """As h11 has it.

        Raises:
            RemoteProtocolError: the client does not speak HTTP, or goes beyond a bound.
        """
        if not self.left:
            return h11.NEED_DATA
        self.left -= 1
        event = super().next_event()
        if type(event) is h11.Request:
            self.requests, self._pieces = self.requests + 1, 0
            self._check_head(event)
        elif type(event) is h11.Data:
            self._pieces += 1
            if self._pieces > self._settings.max_pieces:
                raise h11.RemoteProtocolError(f"the body came in more than {self._settings.max_pieces} pieces")
        return event

    def _check_head(self, head: h11.Request) -> None:
        lines = len(head.headers)
        size = len(head.target) + sum(len(name) + len(value) + 4 for name, value in head.headers)
        if lines > self._settings.max_header_lines or size > self._settings.max_head_bytes:
            raise h11.RemoteProtocolError(f"{lines} header lines of {size} bytes", error_status_hint=431)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in head.headers}:
            # A proxy in front may go by the other one, and take a part of the body for the next request.
            raise h11.RemoteProtocolError("a body has one length: Content-Length or Transfer-Encoding")

    def send(self, event: Any) -> Any:
        """As h11 has it, without a copy of what is sent."""
        parts = self.send_with_data_passthrough(event) or []
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Flow(FlowControl):
    """Reading goes on only when what was read before is used up, whoever asks for it."""

    holds = False

    def hold(self) -> None:
        """Read no more."""
        self.holds = self.read_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless something is held."""
        if not self.holds:
            super().resume_reading()


class _Lingering:
    """A transport that is closed as ``GuardedProtocol`` ends a connection."""

    def __init__(self, transport: Transport, protocol: "GuardedProtocol") -> None:
        self._transport, self.close = transport, protocol.end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GuardedProtocol(H11Protocol):
    """One connection."""

    config: GuardedConfig
    flow: _Flow

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._settings = self.config.settings
        self.conn: _Parser = _Parser(self._settings)
        self._aside = bytearray()  # read while the request before it was being answered
        self._phase, self._since, self._got = ("", 0, 0), 0.0, 0
        self._timer: TimerHandle | None = None
        self._is_full = self._is_stopping = self._is_ended = self._is_untaken = False

    # The connection

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Beyond the bound the connection that keeps us waiting longest gives way; else requests are refused, soon."""
        self._socket = transport
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self.flow = _Flow(transport)
        self.app_state = self.app_state | {"connection": self}
        most = self._settings.max_connections
        if len(self.connections) > most:
            others = [c for c in self.connections if isinstance(c, GuardedProtocol) and c is not self]
            slowest = max(others, key=GuardedProtocol.waited)
            if slowest.waited() >= PATIENCE_S:
                slowest.leave()
            elif len(self.connections) > 2 * most:
                transport.abort()
            else:
                self._is_full, self.app = True, _FULL
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._is_ended = True
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server is stopping; a connection that was just made may still bring its request."""
        self._is_stopping = True
        if self._is_answering() or self.conn.their_state is h11.SEND_BODY:
            if CLOSE_HEADER not in self.headers:
                self.headers.append(CLOSE_HEADER)  # uvicorn repeats it in the reply
        elif self.conn.requests:
            self.end()
        self._settle()

    def end(self) -> None:
        """Close, and go on reading for a while: who is still sending, or has sent what we have not read, would lose the
        answer otherwise."""
        if self._is_ended:
            return
        self._is_ended = True
        one_sided = self._socket.can_write_eof()  # not with TLS: there only who is still sending is waited for
        if self._phase[0] == "idle" or not (one_sided or self._is_sending()):
            self._socket.close()
        else:
            if one_sided:
                self._socket.write_eof()
            self.flow.holds = False
            self.flow.resume_reading()
        self._settle()

    def _is_sending(self) -> bool:
        return bool(self._aside) or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; what comes while a request is being answered waits, and nothing more is read then."""
        self._got += len(data)
        in_body, most = self.conn.their_state is h11.SEND_BODY, self._settings.max_drained_bytes
        if self._phase[0] == "drain" and self._got > (most if in_body else min(most, _LINGER_BYTES)):
            self._socket.abort()
        elif self._is_ended:
            return
        elif self._is_answering() or not self.conn.left:
            self._aside += data
            self.flow.hold()
        else:
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                data = data.lstrip(b"\r\n")  # empty lines before a request mean nothing (RFC 9112, 2.2)
            if data:
                super().data_received(data)
            self._settle()

    def handle_events(self) -> None:
        """Parse what was read, up to the end of a request or of this connection's turn."""
        self.conn.left = _EVENTS_PER_TURN
        super().handle_events()
        if not self.conn.left:
            self.flow.hold()
            self.loop.call_soon(self._go_on)
        if self._is_stopping and self.conn.requests and not self._is_ended:
            self.shutdown()

    def _go_on(self) -> None:
        """Take up what was put aside."""
        if self._is_ended or self._is_answering():
            return
        self.handle_events()
        if self.conn.left and not self._is_answering():
            data, self._aside = bytes(self._aside), bytearray()
            self.flow.holds = False
            self.flow.resume_reading()
            if data:
                self.data_received(data)
        self._settle()

    def _is_answering(self) -> bool:
        """A request is whole and not answered yet, or its answer is not taken."""
        if self.cycle is None or self.conn.their_state is h11.ERROR:
            return False
        whole = self.conn.their_state is not h11.SEND_BODY
        return self.flow.write_paused or self._is_untaken or (whole and not self.cycle.response_complete)

    # What is sent

    def pause_writing(self) -> None:
        """The client must take what was written before more is."""
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        """It has taken nearly all."""
        super().resume_writing()
        if self._is_untaken:
            self._is_untaken = False
            self.on_response_complete()
        self._settle()

    def on_response_complete(self) -> None:
        """The next request's turn comes when the client has taken this answer."""
        if self.flow.write_paused and not self._is_ended:
            self._is_untaken = True
            return
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours counts
        self._go_on()
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser refused."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        in_head = self.cycle is None or self.cycle.response_complete or self.conn.requests == 0
        if status == 431 and in_head:
            most = self._settings.max_head_bytes, self._settings.max_header_lines
            msg = f"the request's head is larger than {most[0]} bytes or {most[1]} lines"
        elif error is not None:
            msg = f"this is not HTTP: {str(error)[:200]}"
        self._answer(status if in_head else 400, msg)
        self.end()

    # How long we wait

    def _awaited(self) -> tuple[str, float | None]:
        """What is awaited, and for how many seconds at most."""
        settings = self._settings
        if self._socket.is_closing() or self.flow.write_paused:
            return "taking", settings.send_timeout_s
        sending = self.conn.their_state is h11.SEND_BODY
        if self._is_ended or (sending and self.cycle.response_complete):
            return "drain", settings.header_timeout_s if sending else min(_LINGER_S, settings.header_timeout_s)
        if sending:
            return "body", settings.header_timeout_s
        if self._is_answering():
            return "answer", None
        if self.conn.requests and not self.conn.trailing_data[0]:
            return "idle", settings.keep_alive_s
        hurries = self._is_full or self._is_stopping
        return "head", min(PATIENCE_S, settings.header_timeout_s) if hurries else settings.header_timeout_s

    def _settle(self) -> None:
        """Arm the timer anew where something began or was completed; nothing else does."""
        name, seconds = self._awaited()
        if (name, self.conn.requests) != self._phase[:2]:
            self._got = 0
        phase = name, self.conn.requests, self._got // STEP if name == "body" else 0
        if phase == self._phase:
            return
        self._phase, self._since = phase, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.leave)

    def waited(self) -> float:
        """Seconds that the client has kept us waiting for the next thing to be completed."""
        return 0.0 if self._phase[0] == "answer" else self.loop.time() - self._since

    def leave(self) -> None:
        """Let go of a client that kept us waiting for too long."""
        name = self._phase[0]
        if name == "taking" or (name == "drain" and self._is_ended):
            self._socket.abort()
        elif name == "body" or (name == "head" and not self._is_stopping):
            self._answer(408, f"the request's {name} did not arrive in time")
            self.end()
            return
        self._is_ended = True
        self._socket.close()
        self._settle()

    def _answer(self, status: int, text: str) -> None:
        """Answer without the application, which learns that the client is gone."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                return
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._socket.write(head.encode() + body)
