"""From a request to its answer: the body read within bounds, work done in the compute thread, the reply sent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Request, Response

from .errors import DeadlineError, SlowBodyError
from .formats.limits import content_coding, decompress, expected_bytes, read_body
from .formats.wire import Reply, parse_json
from .layers.protocol import unsent_bytes
from .payload import Payload
from .service import Service

HEADER_LENGTH = "Inference-Header-Content-Length"


def service_of(request: Request) -> Service:
    """The process's service."""
    service: Service = request.app.state.service
    return service


async def _body(request: Request, limit: int) -> bytearray:
    """The body as sent, within ``limit`` bytes and the time allowed."""
    seconds = service_of(request).settings.body_timeout_s
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request.headers, request.stream(), limit)
    except TimeoutError:
        raise SlowBodyError(f"the body did not arrive within {seconds:g} seconds") from None


async def computed(request: Request, limit: int, work: Callable[[Payload], Reply]) -> Response:
    """Wait for a place, read a body of at most ``limit`` bytes, work on it in the compute thread."""
    service = service_of(request)
    coding = content_coding(request.headers)
    with service.engine.place(expected_bytes(request.headers, limit), unsent_bytes()) as place:
        body = await _body(request, limit)
        service.answers.bytes_in += len(body)
        payload = Payload(body, coding, request.headers.get(HEADER_LENGTH), service.settings.deadline_s)
        try:
            async with asyncio.timeout(payload.deadline_s), _watched(request, payload):
                return _response(request, await service.engine.run(partial(work, payload), place))
        except TimeoutError:
            raise DeadlineError(f"no answer within {payload.deadline_s:g} s", hint="try again later") from None


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


def _response(request: Request, reply: Reply) -> Response:
    request.state.record = reply.record
    headers = None if reply.header_length is None else {HEADER_LENGTH: str(reply.header_length)}
    return Response(memoryview(reply.body), 200, headers, reply.media_type)


async def json_object(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty one."""
    coding, limit = content_coding(request.headers), service_of(request).settings.max_json_header_bytes
    return parse_json(decompress(await _body(request, limit), coding, limit))
