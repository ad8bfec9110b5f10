"""What the environment says about object storage."""

import os
from dataclasses import dataclass
from pathlib import Path

from calib.errors import SettingError
from calib.settings import parse_bytes


@dataclass(frozen=True)
class StorageSettings:
    """``mirror``: folder of the local disk cache (CALIB_MIRROR). ``mirror_bytes``: the most it may hold
    (CALIB_MIRROR_BYTES). ``lease_s``: a writer that gave no sign of life for so many seconds is taken for dead
    (CALIB_LEASE_SECONDS); all writers of a place must agree on it.
    """

    mirror: Path
    mirror_bytes: int
    lease_s: float

    @classmethod
    def read(cls) -> "StorageSettings":
        """
        Raises:
            SettingError: a size or a number of seconds that is none.
        """
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        seconds = os.environ.get("CALIB_LEASE_SECONDS", "60")
        if not seconds.replace(".", "", 1).isdecimal() or float(seconds) <= 0:
            raise SettingError(f"CALIB_LEASE_SECONDS is '{seconds}': expected a number of seconds above 0")
        return cls(
            Path(os.environ.get("CALIB_MIRROR") or home / "calib").resolve(),
            parse_bytes(os.environ.get("CALIB_MIRROR_BYTES", "100GB")),
            float(seconds),
        )
