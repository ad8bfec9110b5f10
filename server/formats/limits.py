"""Bodies within bounds: sizes are checked before reading, while reading and while decompressing."""

import re
import zlib
from collections.abc import AsyncIterator, Mapping

from ..errors import BadRequestError, MediaTypeError, TooLargeError

# zlib's window parameter: 31 = gzip wrapper, 15 = zlib wrapper, which HTTP calls deflate (RFC 9110, 8.4.1.2).
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
# Features, boxes and logits of the largest request are three times 20,000 rows.
_MAX_CONTAINERS = 100_000
_DECIMAL = re.compile(r"[0-9]{1,18}", re.ASCII)


def decimal(text: str, what: str) -> int:
    """A header's decimal number.

    Raises:
        BadRequestError: anything but 1 to 18 ASCII digits.
    """
    if not _DECIMAL.fullmatch(text):
        raise BadRequestError(f"{what} is '{text[:32]}': expected a decimal number")
    return int(text)


def content_coding(headers: Mapping[str, str]) -> str | None:
    """The body's coding, or None when it is sent as it is.

    Raises:
        MediaTypeError: a coding other than gzip and deflate, or several.
    """
    coding = headers.get("content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _WINDOW_BITS:
        raise MediaTypeError(f"Content-Encoding '{coding[:32]}' is not supported", hint="send gzip, deflate or none")
    return coding


def expected_bytes(headers: Mapping[str, str], limit: int) -> int:
    """The announced length of a body, or ``limit`` where none is announced.

    Raises:
        TooLargeError: it is more than ``limit``. BadRequestError: no number.
    """
    announced = headers.get("content-length")
    if announced is None:
        return limit
    size = decimal(announced, "Content-Length")
    if size > limit:
        raise _too_large(f"the body has {announced} bytes", limit)
    return size


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limit: int) -> bytearray:
    """Read a body of at most ``limit`` bytes; its announced length is checked before anything is read.

    Raises:
        TooLargeError: announced or sent more than ``limit``. BadRequestError: no number in Content-Length.
    """
    expected_bytes(headers, limit)
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise _too_large("the body is larger", limit)
    return body


def decompress(body: bytearray, coding: str | None, limit: int) -> bytearray:
    """Undo ``coding``; at most ``limit`` bytes are ever produced.

    Raises:
        TooLargeError: the content is larger. BadRequestError: damaged, truncated, or followed by more data.
    """
    if coding is None:
        return body
    stream = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as e:
        raise BadRequestError(f"the {coding} body is damaged: {e}") from None
    if len(content) > limit:
        raise _too_large("the decompressed body is larger", limit)
    if not stream.eof:
        raise BadRequestError(f"the {coding} body is truncated")
    if stream.unused_data:
        raise BadRequestError(f"the {coding} body is followed by {len(stream.unused_data)} more bytes")
    return bytearray(content)


def check_containers(text: bytearray | memoryview) -> None:
    """Bound lists and objects in JSON before it is parsed: 3 bytes of text each, 60 or more in memory.

    Raises:
        BadRequestError: more brackets than any request needs.
    """
    content = bytes(text)
    found = content.count(b"[") + content.count(b"{")
    if found > _MAX_CONTAINERS:
        raise BadRequestError(f"the JSON holds {found} lists and objects: at most {_MAX_CONTAINERS} are accepted")


def _too_large(what: str, limit: int) -> TooLargeError:
    return TooLargeError(f"{what}: at most {limit} bytes are accepted", hint="send fewer rows per request")
