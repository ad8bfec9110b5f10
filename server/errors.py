"""What the service answers besides the library's own errors. Each class carries its HTTP status.

CalibError
├── BadRequestError    bytes or JSON that do not follow the protocol          400
├── NotServedError     a model or version that is not there or not loaded     404
├── SlowBodyError      the body did not arrive in time                        408
├── ClientLeftError    nobody waits for the answer any more                   400, never seen
├── DeadlineError      the answer would have come too late                    504
├── TooLargeError      a body, header or reply beyond its limit               413
├── MediaTypeError     a Content-Encoding that is not spoken                  415
└── BusyError          the queue is full, or nothing is loaded                503
"""

import reprlib

from calib.errors import CalibError


class BadRequestError(CalibError):
    """The request does not follow the protocol."""


class NotServedError(CalibError):
    """A model or version that is not there or not loaded."""

    status = 404


class SlowBodyError(CalibError):
    """The body did not arrive in time."""

    status = 408


class ClientLeftError(CalibError):
    """Nobody waits for the answer any more."""


class DeadlineError(CalibError):
    """The request waited or computed longer than it, or the server, allows."""

    status = 504


class TooLargeError(CalibError):
    """A body, a JSON header or the reply would exceed its limit."""

    status = 413


class MediaTypeError(CalibError):
    """A Content-Encoding that is not spoken here."""

    status = 415


class BusyError(CalibError):
    """The server cannot take the request now; a later try may succeed."""

    status = 503


def reason_of(error: Exception) -> str:
    """A word for the metrics: CANCELED, REJECTED, TIMEOUT, BAD_REQUEST or INTERNAL."""
    if isinstance(error, ClientLeftError):
        return "CANCELED"
    status = error.status if isinstance(error, CalibError) else 500
    words = {408: "TIMEOUT", 504: "TIMEOUT", 429: "REJECTED", 503: "REJECTED"}
    return words.get(status, "BAD_REQUEST" if status < 500 else "INTERNAL")


def shown(value: object) -> str:
    """A client's value in an error: short, and whatever its depth."""
    return reprlib.repr(value)[:64] if not isinstance(value, str) else value[:64]


def text_of(error: CalibError) -> str:
    """The one line that a client gets: message and next step."""
    return f"{error} ({error.hint})" if error.hint else str(error)
