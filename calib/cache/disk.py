"""Asking the disk for parts of a mapped file before they are needed.

A page of a map that is not in memory is waited for, and brings its neighbours with it, wanted or not: reading a run of
rows here and another there, most of what comes from the disk is never looked at. What was asked for comes alone, and
all at once (``benchmarks/cache.py``, runs). In sequence the system's own reading ahead is as fast.
"""

import os
import weakref
from mmap import PAGESIZE
from pathlib import Path

from calib.errors import InputError

ASKED_BYTES = 1 << 17  # Linux reads no more for one request where the disk's read-ahead is left as it comes


class Disk:
    """One file, kept open."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def ask(self, low: int, high: int) -> None:
        """Have bytes ``low:high``, more than none, brought meanwhile; does nothing where the system has no such call.

        What begins and ends in memory is taken to be there: looking at all of it would cost as much as asking.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        if high - low > ASKED_BYTES and self._has(low) and self._has(high - 1):
            return
        for at in range(low - low % PAGESIZE, high, ASKED_BYTES):
            os.posix_fadvise(self._fd, at, min(ASKED_BYTES, high - at), os.POSIX_FADV_WILLNEED)

    def _has(self, at: int) -> bool:
        """Whether the byte is in memory."""
        try:
            return os.preadv(self._fd, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # it is not; or a file system or system that cannot tell
            return False


def allow_open(count: int) -> None:
    """Let this process open ``count`` more mapped files, each of which takes two descriptors: the usual limit of 1,024
    is a soft one.

    Raises:
        InputError: the system does not allow it.
    """
    try:
        import resource
    except ImportError:  # no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len([*Path("/dev/fd").iterdir()]) + 2 * count + 64
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InputError(
            f"{count} files are to be mapped, for which {needed} must be open; the system allows {hard}",
            hint="raise it (ulimit -Hn), or make fewer shards: calib cache compact --rows-per-shard",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
