"""A place that was named on the command line: a local path, or a folder or object of an object store."""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from calib.errors import InputError, MissingExtraError, UnsupportedError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# Protocol -> the package that speaks it, and the extra that brings it.
PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}
_S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}}


@dataclass(frozen=True)
class Remote:
    """``PROTOCOL://BUCKET/KEY``; the key is a prefix (a folder) or an object."""

    protocol: str
    path: str  # BUCKET/KEY, without a slash at the end

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.protocol, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """Without the last part."""
        return Remote(self.protocol, self.path.rpartition("/")[0])

    @property
    def fs(self) -> Any:
        """Its fsspec file system.

        Raises:
            MissingExtraError: the package that speaks the protocol is not installed.
        """
        return _filesystem(self.protocol)

    @property
    def identity(self) -> str:
        """The URL with the server behind it: two servers may have buckets of one name."""
        endpoints = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
        return " ".join([str(self), *(endpoints if self.protocol == "s3" else [])])


def parse(place: str | Path) -> Path | Remote:
    """A local path, also of ``file://``, or an object of a store.

    Raises:
        UnsupportedError: another kind of URL. InputError: no bucket or no key, or credentials in the URL.
    """
    text = str(place)
    found = URL.match(text)
    if isinstance(place, Path) or found is None:
        return Path(place)
    protocol = found[1].lower()
    if protocol == "file":
        return Path(unquote(urlsplit(text).path))
    if protocol not in PACKAGES:
        raise UnsupportedError(f"{protocol}:// is not supported", hint="s3://, gs://, file:// or a local path")
    bucket, _, key = text[found.end() :].rstrip("/").partition("/")
    if "@" in bucket:  # not repeated in the message
        raise InputError("credentials in a URL would end up in logs", hint="put them into the environment or a profile")
    if not bucket or not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise InputError(f"{text} does not name a place in a bucket", hint=f"{protocol}://BUCKET/FOLDER/NAME")
    return Remote(protocol, f"{bucket}/{key}")


@cache
def _filesystem(protocol: str) -> Any:
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}  # others write here too
    if protocol == "s3" and "config_kwargs" not in conf.get("s3", {}):
        options["config_kwargs"] = _S3_CLIENT
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        raise MissingExtraError(*PACKAGES[protocol]) from None
