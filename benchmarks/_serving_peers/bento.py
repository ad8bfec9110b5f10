"""BentoML: an API with a bytes root input and a bytes output, and the same work in a mounted ASGI application.

A positional-only ``bytes`` argument receives the body as it is, and ``ContentType`` lets bytes out as they are. A
mounted application is the other documented way to raw bytes; it passes BentoML's middlewares, not its types.
Metrics and access log are off, one worker, one thread.
"""

import asyncio
from typing import Annotated, Any

import bentoml
from _head import Head
from bentoml.validators import ContentType

BINARY = "application/octet-stream"
head = Head()


async def mounted(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, score it in a thread, answer."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = await asyncio.to_thread(head.answer, body)
    headers = [(b"content-type", BINARY.encode()), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@bentoml.service(workers=1, threads=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(mounted, path="/mounted")
class Scorer:
    """POST /scores, POST /mounted/."""

    @bentoml.api(route="/scores")
    def scores(self, body: bytes, /) -> Annotated[bytes, ContentType(BINARY)]:
        """float16 bytes -> float32 bytes."""
        return head.answer(body)
