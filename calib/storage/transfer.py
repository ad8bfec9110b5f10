"""Single requests to an object store, repeated with back-off, their errors as ours.

The clients repeat requests themselves; what they give up, or what arrives damaged, is begun again here.
"""

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from calib.errors import CalibError, ExistsError, FormatError, InputError, MissingFileError, StorageError
from calib.storage.location import Remote

ATTEMPTS = 6
LONGEST_WAIT_S = 10.0
PART = 16 << 20  # bytes of a ranged read
READERS = 4

T = TypeVar("T")
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "google", "asyncio")


def retrying(action: Callable[[], T], place: Remote) -> T:
    """``action()``, again while the network or the server fails, after 0.2, 0.4, 0.8 ... seconds (less up to a half at
    random, so that many machines do not come back at once).

    Raises:
        MissingFileError: there is no such object. InputError: access is refused. StorageError: it failed every time.
        FileExistsError: as it is, of a conditional write.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileExistsError:
            raise
        except Exception as e:
            if not _is_of_the_client(e):
                raise
            is_last = attempt == ATTEMPTS - 1
            if is_last or isinstance(e, _FINAL) or type(e).__name__ in _FINAL_NAMES:
                raise _explained(e, place) from e
        time.sleep(min(0.2 * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def _is_of_the_client(error: Exception) -> bool:
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | _DamagedError) or module in _CLIENTS


class _DamagedError(Exception):
    """What arrived is not what was to come."""


def _explained(error: Exception, place: Remote) -> CalibError:
    if isinstance(error, _DamagedError):
        return FormatError(f"{place}: {error}", hint="calib cache check on it says which files are damaged")
    if isinstance(error, FileNotFoundError):
        if "bucket does not exist" in str(error):
            bucket = place.path.partition("/")[0]
            return MissingFileError(f"there is no bucket {place.protocol}://{bucket}", hint="is its name right?")
        return MissingFileError(f"{place} is not there", hint="is its name right? was it written to the end?")
    if isinstance(error, PermissionError) or type(error).__name__ in _FINAL_NAMES:
        return InputError(
            f"access to {place} is refused: {error}",
            hint="credentials come from the environment or a profile: AWS_ACCESS_KEY_ID, AWS_PROFILE, ...",
        )
    return StorageError(
        f"{place}: {type(error).__name__}: {error} ({ATTEMPTS} attempts)",
        hint="is the server there (AWS_ENDPOINT_URL)? the same command goes on (calib extract: with --resume)",
    )


def read(place: Remote) -> bytes:
    """A small object. Raises as ``retrying``."""
    return bytes(retrying(lambda: place.fs.cat_file(place.path), place))


def exists(place: Remote) -> bool:
    """Whether the object is there; a folder is none. Raises as ``retrying``."""
    try:
        found = retrying(lambda: place.fs.info(place.path), place)
    except MissingFileError:
        return False
    return bool(found["type"] == "file")


def listing(place: Remote) -> list[dict[str, Any]]:
    """What lies directly below: fsspec's ``name``, ``size``, ``type`` and what the store adds; empty if nothing does.

    Raises:
        InputError, StorageError: as ``retrying``.
    """
    try:
        found: list[dict[str, Any]] = retrying(lambda: place.fs.ls(place.path, detail=True, refresh=True), place)
    except MissingFileError:
        return []
    return [f for f in found if f["name"].startswith(f"{place.path}/") and f["name"] != f"{place.path}/"]


def replace(place: Remote, content: bytes) -> None:
    """Write a small object, whatever was there. Raises as ``retrying``."""
    retrying(lambda: place.fs.pipe_file(place.path, content), place)


def create(place: Remote, content: bytes) -> None:
    """Write a small object unless there is one: a conditional PUT (If-None-Match: *), which the store decides.

    Raises:
        ExistsError: there is one, of another content. Others as ``retrying``.
    """
    try:
        retrying(lambda: place.fs.pipe_file(place.path, content, mode="create"), place)
    except FileExistsError:
        # A request that was repeated may meet its own first attempt, whose answer was lost.
        if read(place) != content:
            raise ExistsError(f"{place} exists", hint="another process has written it") from None


def upload(file: Path, place: Remote) -> None:
    """Write the object from ``file``, in parts where it is large; the store has all of its bytes then.

    Raises:
        As ``retrying``.
    """
    size = file.stat().st_size

    def put() -> None:
        place.fs.put_file(str(file), place.path)
        if (there := place.fs.info(place.path)["size"]) != size:
            raise _DamagedError(f"{there} of {size} bytes arrived")

    retrying(put, place)


def download(place: Remote, fd: int, size: int, xxh3: str | None) -> None:
    """Write the object into the open file ``fd``, part by part and several at once.

    Raises:
        FormatError: it has another size, or another hash every time. Others as ``retrying``.
    """

    def part(start: int) -> None:
        stop = min(start + PART, size)

        def get() -> bytes:
            content: bytes = place.fs.cat_file(place.path, start=start, end=stop)
            if len(content) != stop - start:
                raise _DamagedError(f"{len(content)} bytes instead of {stop - start} from {start} on")
            return content

        os.pwrite(fd, retrying(get, place), start)

    def whole() -> None:
        starts = range(0, size, PART)
        if len(starts) <= 1:
            for start in starts:
                part(start)
        else:
            with ThreadPoolExecutor(READERS) as pool:
                for _ in pool.map(part, starts):
                    pass
        if xxh3 is not None and _hash(fd, size) != xxh3:
            raise _DamagedError("its content is not what was written")

    retrying(whole, place)


def _hash(fd: int, size: int) -> str:
    digest = xxhash.xxh3_64()
    for start in range(0, size, PART):
        digest.update(os.pread(fd, PART, start))
    return digest.hexdigest()


def remove(place: Remote) -> None:
    """Remove everything below ``place``. Raises as ``retrying``."""
    for entry in listing(place):
        inner = Remote(place.protocol, entry["name"])
        if entry["type"] == "directory":
            remove(inner)
        else:
            retrying(lambda one=inner: one.fs.rm_file(one.path), inner)  # type: ignore[misc]
