"""From a request to its answer: the body read within bounds, work done in the compute thread, the reply sent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Request, Response

from .errors import DeadlineError, SlowBodyError
from .formats.limits import content_coding, decompress, read_body
from .formats.wire import Reply, parse_json
from .held import Held, Share
from .layers.asgi import Receive, Scope, Send
from .payload import Payload
from .service import Service

_PIECE = 256 << 10  # bytes of a reply that the client must take within send_timeout_s
HEADER_LENGTH = "Inference-Header-Content-Length"


def service_of(request: Request) -> Service:
    """The process's service."""
    service: Service = request.app.state.service
    return service


async def _body(request: Request, limit: int, share: Share) -> bytearray:
    """The body as sent, within ``limit`` bytes and the time allowed; what has come is held in ``share``."""
    service = service_of(request)
    seconds = service.settings.body_timeout_s

    async def counted() -> AsyncIterator[bytes]:
        async for piece in request.stream():
            service.held.resize(share, share.size + len(piece))
            yield piece

    try:
        async with asyncio.timeout(seconds):
            return await read_body(request.headers, counted(), limit)
    except TimeoutError:
        raise SlowBodyError(f"the body did not arrive within {seconds:g} seconds") from None


async def computed(request: Request, limit: int, work: Callable[[Payload], Reply]) -> Response:
    """Read a body of at most ``limit`` bytes, wait for a place, work on it in the compute thread."""
    service = service_of(request)
    coding = content_coding(request.headers)
    with service.engine.place(0):  # where all places are taken, before anything is read
        pass
    with service.held.share(_connection(request)) as share:
        body = await _body(request, limit, share)
        service.answers.bytes_in += len(body)
        payload = Payload(body, coding, request.headers.get(HEADER_LENGTH), service.settings.deadline_s)
        with service.engine.place(0) as place:
            try:
                async with asyncio.timeout(payload.deadline_s), _watched(request, payload):
                    reply = await service.engine.run(partial(work, payload), place)
            except TimeoutError:
                raise DeadlineError(f"no answer within {payload.deadline_s:g} s", hint="try again later") from None
        service.held.resize(share, len(reply.body))
    request.state.record = reply.record
    headers = None if reply.header_length is None else {HEADER_LENGTH: str(reply.header_length)}
    return _Held(service.held, _connection(request), reply, headers)


def _connection(request: Request) -> Any:
    return request.scope.get("state", {}).get("connection")


class _Held(Response):
    """A reply that is held until it was taken: what the client does not take now stays here, not in the transport."""

    def __init__(self, held: Held, connection: Any, reply: Reply, headers: dict[str, str] | None) -> None:
        super().__init__(memoryview(reply.body), 200, headers, reply.media_type)
        self._held, self._connection = held, connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held.share(self._connection, len(self.body)):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), _PIECE):
                end = start + _PIECE
                more = end < len(self.body)
                await send({"type": "http.response.body", "body": self.body[start:end], "more_body": more})


@asynccontextmanager
async def _watched(request: Request, payload: Payload) -> AsyncIterator[None]:
    """Note when nobody waits any more, since the client left, it took too long or the server stops: work that is queued
    is dropped then, and work that was begun ends at its next look."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        payload.client_left.set()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        payload.client_left.set()


async def json_object(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty one."""
    coding, limit = content_coding(request.headers), service_of(request).settings.max_json_header_bytes
    with service_of(request).held.share(_connection(request)) as share:
        return parse_json(decompress(await _body(request, limit, share), coding, limit))
