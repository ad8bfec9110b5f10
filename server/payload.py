"""A request's body on its way from the event loop to the compute thread."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from .errors import BadRequestError, ClientLeftError, DeadlineError
from .formats.limits import decompress
from .serve_settings import ServeSettings


@dataclass(frozen=True)
class Payload:
    """A body as it arrived, not yet decompressed."""

    body: bytearray
    coding: str | None
    header_length: str | None = None
    deadline_s: float = float("inf")
    client_left: threading.Event = field(default_factory=threading.Event)
    submitted_ns: int = field(default_factory=time.perf_counter_ns)

    def check_wanted(self, timeout_us: Any = None) -> None:
        """Drop what nobody waits for any more, and what is too late by the server's deadline or the client's own.

        Raises:
            DeadlineError: it is. ClientLeftError: nobody waits. BadRequestError: the client's deadline is no whole
                number of microseconds.
        """
        if self.client_left.is_set():
            raise ClientLeftError("the client left before its turn came")
        if timeout_us is not None and (type(timeout_us) is not int or timeout_us < 0):
            raise BadRequestError("parameter 'timeout' must be a whole number of microseconds")
        allowed = min(self.deadline_s, timeout_us / 1e6 if timeout_us else float("inf"))  # 0: none, as Triton has it
        waited = (time.perf_counter_ns() - self.submitted_ns) / 1e9
        if waited > allowed:
            raise DeadlineError(f"the request waited {waited:.3f} s, {allowed:g} s are allowed", hint="try again later")

    def content(self, limit: int) -> bytearray:
        """The decompressed body."""
        return decompress(self.body, self.coding, limit)


def body_limit(header_length: str | None, settings: ServeSettings) -> int:
    """Bytes of an inference body: JSON takes many times its size once parsed, tensors do not."""
    return settings.max_json_bytes if header_length is None else settings.max_body_bytes
