"""Every error that a user can cause.

CalibError
├── InputError            a file, array or argument that was given          exit 2, HTTP 400
│   ├── MissingFileError  it is not there
│   ├── FormatError       truncated, damaged, or not the format expected
│   ├── VersionError      written by another version of the format
│   ├── ShapeError        arrays whose shapes do not fit together
│   └── NonFiniteError    NaN or infinity where numbers must be finite
├── SettingError          an unknown key or a value of the wrong type
├── UnknownNameError      no such method, model, question ... (the nearest is named)   HTTP 404
├── ExistsError           an output is there already
├── DiskFullError         no space, or a limit on file sizes
├── ProcessError          a process that was to do part of the work is gone
├── StorageError          an object store that does not answer, time after time        HTTP 502
├── UnsupportedError      a combination that the method is not defined for            HTTP 501
├── MissingExtraError     an optional dependency is not installed
├── ReplayError           the rows of a cache do not give what the detector itself detects   HTTP 500
├── ExportError           an export does not compute what its head computes           HTTP 500
└── FitError              training did not converge or left the finite numbers        HTTP 500

The message says what was wrong and what was expected; ``hint`` says what to do next. The command line prints
both and exits with 2; the server sends the message with ``status``.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

DISTRIBUTION = "calib-longtail"  # the name to install; `calib` on PyPI is somebody else's


class CalibError(Exception):
    """Base of all errors a user can cause. ``hint`` is the next step, ``status`` the HTTP code."""

    status = 400

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # Python shows it below a traceback

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process may be sent it, whatever its class was made from."""
        return _made_again, (type(self), str(self)), self.__dict__


def _made_again(kind: type[CalibError], message: str) -> CalibError:
    error = kind.__new__(kind, message)
    Exception.__init__(error, message)
    return error


class InputError(CalibError):
    """A file, array or argument that was given cannot be used."""


class MissingFileError(InputError):
    """A file or folder that was named does not exist."""


class FormatError(InputError):
    """A file is truncated, damaged or of another kind."""


class VersionError(InputError):
    """A file was written by another version of its format."""


class ShapeError(InputError):
    """Arrays whose shapes do not fit together."""


class NonFiniteError(InputError):
    """NaN or infinity where numbers must be finite."""


class SettingError(CalibError):
    """An unknown setting, or a value of the wrong type or range."""


class UnknownNameError(CalibError):
    """No such method, model or question; the nearest known name is suggested."""

    status = 404

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=1)
        guess = f". Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {kind} '{name}'{guess}", hint=hint or f"known: {', '.join(names)}")


class ExistsError(CalibError):
    """The output exists already and would be overwritten."""

    status = 409


class DiskFullError(CalibError):
    """There is no space left on the disk, or a file reached the size that is allowed."""

    status = 507


class ProcessError(CalibError):
    """A process that was to do part of the work ended before it was done."""

    status = 500


class StorageError(CalibError):
    """An object store did not do what was asked, however often it was asked."""

    status = 502


class UnsupportedError(CalibError):
    """A combination that is not defined, for example a softmax-only method on a sigmoid detector."""

    status = 501


class MissingExtraError(CalibError):
    """An optional dependency is not installed."""

    status = 501

    def __init__(self, package: str, extra: str, *, hint: str = "") -> None:
        super().__init__(f"{package} is not installed", hint=hint or f"pip install '{DISTRIBUTION}[{extra}]'")


class ReplayError(CalibError):
    """The rows of a cache do not give what the detector itself detects."""

    status = 500


class ExportError(CalibError):
    """An export does not compute what its head computes."""

    status = 500


class FitError(CalibError):
    """Training left the finite numbers or could not start."""

    status = 500


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
