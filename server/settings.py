"""Settings of the service, from arguments or from environment variables ``CALIB_SERVE_*``."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from calib.errors import SettingError

PREFIX = "CALIB_SERVE_"
MIB = 1 << 20
MAX_ROWS = 20_000
Pinned = Annotated[dict[str, Annotated[int, Field(ge=0)]], NoDecode]
Keys = Annotated[tuple[SecretStr, ...], NoDecode]  # not JSON in the environment, but words with commas


class ServeSettings(BaseSettings):
    """What a server process needs to know. Sizes are bytes, times seconds.

    ``max_body_bytes`` holds for the body as sent and once more for the body after decompression;
    ``max_json_bytes`` for bodies that are JSON only, ``max_json_header_bytes`` for JSON in front of tensors.
    ``max_pending`` counts requests that were accepted and not yet answered: bodies are kept in memory.

    ``api_keys`` and ``admin_keys`` (comma between several) close the service: only health is open then, and loading
    needs an admin key. ``rate`` is requests a second per key (per address without keys), ``burst`` at once.
    ``deadline_s`` is how long a request may wait and compute; clients may ask for less.

    ``pinned`` (NAME=VERSION, comma between several) is the version that answers where a request names none; the highest
    otherwise. With ``watch_s`` the model folder is looked at so often, and what is new or changed there is loaded.
    ``access_log`` writes a JSON line per answered request. ``ssl_ca_certs`` asks clients for a certificate.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    models: Path
    torch_threads: int = Field(default=1, ge=1)
    max_body_bytes: int = Field(default=64 * MIB, ge=1)
    max_json_bytes: int = Field(default=16 * MIB, ge=1)
    max_json_header_bytes: int = Field(default=MIB, ge=1)
    max_reply_bytes: int = Field(default=128 * MIB, ge=1)
    max_rows: int = Field(default=MAX_ROWS, ge=1, le=MAX_ROWS)
    max_images: int = Field(default=64, ge=1)
    max_pending: int = Field(default=64, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0)
    deadline_s: float = Field(default=60.0, gt=0)
    api_keys: Keys = ()
    admin_keys: Keys = ()
    rate: float | None = Field(default=None, gt=0)
    burst: int = Field(default=20, ge=1)
    pinned: Pinned = {}
    watch_s: float | None = Field(default=None, gt=0)
    access_log: bool = False
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    docs: bool = True
    metrics: bool = True

    @field_validator("pinned", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return {name.strip(): version.strip() for name, _, version in (p.partition("=") for p in value.split(",") if p)}

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [key.strip() for key in value.split(",") if key.strip()] if isinstance(value, str) else value


def from_environment() -> ServeSettings:
    """Read ``CALIB_SERVE_*``.

    Raises:
        SettingError: ``CALIB_SERVE_MODELS`` is not set, or a value is not of its type.
    """
    try:
        return ServeSettings()  # type: ignore[call-arg]  # filled from the environment
    except ValidationError as e:
        first = e.errors()[0]
        name = PREFIX + ".".join(str(part) for part in first["loc"]).upper()
        raise SettingError(f"{name}: {first['msg']}", hint=f"set {name} in the environment") from e
