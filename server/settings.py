"""Settings of the service, from arguments or from environment variables ``CALIB_SERVE_*``."""

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from calib.errors import SettingError

PREFIX = "CALIB_SERVE_"
MIB = 1 << 20
MAX_ROWS = 20_000


class ServeSettings(BaseSettings):
    """What a server process needs to know. Sizes are bytes, times seconds.

    ``max_body_bytes`` holds for the body as sent and once more for the body after decompression;
    ``max_json_bytes`` for bodies that are JSON only, ``max_json_header_bytes`` for JSON in front of tensors.
    ``max_pending`` counts requests that were accepted and not yet answered: bodies are kept in memory.
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
    docs: bool = True


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
