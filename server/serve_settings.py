"""Settings of the service: from flags, then from environment variables ``CALIB_SERVE_*``, then from a TOML file."""

import os
import re
import ssl
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from calib.errors import SettingError, UnknownNameError
from calib.files import require
from calib.settings import load_toml

PREFIX = "CALIB_SERVE_"
_IN_ENVIRONMENT = "in the environment"
MIB = 1 << 20
MAX_ROWS = 20_000
Keys = tuple[SecretStr, ...]
Pinned = dict[str, Annotated[int, Field(ge=0)]]


def _parts(value: object, what: str) -> list[str]:
    """Parts of a text with commas, without the spaces around them; of a list, as they are. None may be empty."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(f"expected {what} with commas between them, and none that is empty")
    return list(parts)


class ServeSettings(BaseModel):
    """What a server process needs to know. Sizes are bytes, times seconds.

    ``processes`` share the port; limits on requests hold for each of them. ``precision`` bf16 halves the time
    of the matrix products where the processor has instructions for it and moves logits by up to 0.4 %.

    ``max_body_bytes`` holds for the body as sent and once more for the body after decompression;
    ``max_json_bytes`` for bodies that are JSON only, ``max_json_header_bytes`` for JSON in front of tensors.
    ``max_pending`` bounds requests that are whole and not yet answered, ``max_pending_bytes`` what bodies that have
    come and replies that are not taken hold. ``max_connections`` counts open connections, idle ones included.
    ``max_head_bytes`` and ``max_header_lines`` bound a request's head, ``max_pieces`` the pieces of a body,
    ``max_drained_bytes`` what is read and dropped of a body that was refused.
    ``header_timeout_s`` is for a head and for every 64 KiB of a body, ``body_timeout_s`` for a whole body,
    ``send_timeout_s`` for every 256 KiB of a reply to be taken, ``keep_alive_s`` closes idle connections.
    ``proxies`` (addresses or networks, comma between several) are those whose X-Forwarded-For is believed.
    ``allowed_hosts`` (comma between several) are names under which browsers and proxies ask.

    ``api_keys`` and ``admin_keys`` (comma between several) close the service: only health is open then, and loading
    needs an admin key. Without keys loading needs a request of this machine to a service on loopback.
    ``rate`` is requests a second per key (per address without keys), ``burst`` at once.
    ``deadline_s`` is how long a request may wait and compute; clients may ask for less.

    ``pinned`` (NAME=VERSION, comma between several) is the version that answers where a request names none; the highest
    otherwise. With ``watch_s`` the model folder is looked at so often, and what is new or changed there is loaded.
    ``access_log`` writes a JSON line per answered request, ``telemetry`` sends OpenTelemetry spans where the standard
    OTEL_* variables say. ``ssl_ca_certs`` asks clients for a certificate. ``report`` is a page of ``calib report``,
    served at ``/report``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    processes: int = Field(default=1, ge=1, le=256)
    torch_threads: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    max_body_bytes: int = Field(default=64 * MIB, ge=1)
    max_json_bytes: int = Field(default=16 * MIB, ge=1)
    max_json_header_bytes: int = Field(default=MIB, ge=1)
    max_reply_bytes: int = Field(default=128 * MIB, ge=1)
    max_rows: int = Field(default=MAX_ROWS, ge=1, le=MAX_ROWS)
    max_images: int = Field(default=64, ge=1)
    max_pending: int = Field(default=64, ge=1)
    max_pending_bytes: int = Field(default=512 * MIB, ge=1)
    max_connections: int = Field(default=1000, ge=1)
    max_head_bytes: int = Field(default=64 << 10, ge=1)
    max_header_lines: int = Field(default=100, ge=1)
    max_pieces: int = Field(default=100_000, ge=1)
    max_drained_bytes: int = Field(default=256 * MIB, ge=0)
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    send_timeout_s: float = Field(default=30.0, gt=0)
    keep_alive_s: int = Field(default=30, ge=1)
    proxies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    deadline_s: float = Field(default=60.0, gt=0)
    api_keys: Keys = ()
    admin_keys: Keys = ()
    rate: float | None = Field(default=None, gt=0)
    burst: int = Field(default=20, ge=1)
    pinned: Pinned = {}
    watch_s: float | None = Field(default=None, gt=0)
    access_log: bool = False
    telemetry: bool = False
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    docs: bool = True
    metrics: bool = True
    report: Path | None = None

    @field_validator("pinned", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part]
        if not all(name.strip() and version.strip().isdecimal() for name, _, version in pairs):
            raise ValueError(f"expected NAME=VERSION with commas between several, got '{value}'")
        return {name.strip(): version.strip() for name, _, version in pairs}

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = [name.strip().lower() for name in _parts(value, "names")]
        if not all(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", name) for name in names):
            raise ValueError(f"expected names as in example.org, without scheme and port, got '{','.join(names)}'")
        return tuple(names)

    @field_validator("proxies", mode="before")
    @classmethod
    def _networks(cls, value: object) -> object:
        return tuple(str(ip_network(name.strip())) for name in _parts(value, "addresses or networks"))

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _parts(value, "keys")

    def check_files(self) -> None:
        """Certificates are there, and complete; so is the report.

        Raises:
            MissingFileError, SettingError: they are not.
        """
        if self.report is not None and not require(self.report, PREFIX + "REPORT").is_file():
            raise SettingError(f"report {self.report} is a folder", hint="name the page that calib report wrote")
        paths = {name: getattr(self, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
        given = {name: path for name, path in paths.items() if path is not None}
        for name, path in given.items():
            require(path, f"setting {name}")
        if given and not {"ssl_certfile", "ssl_keyfile"} <= set(given):
            raise SettingError("TLS needs both ssl_certfile and ssl_keyfile")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if "ssl_certfile" in given:
                context.load_cert_chain(given["ssl_certfile"], given["ssl_keyfile"])
            if "ssl_ca_certs" in given:
                context.load_verify_locations(given["ssl_ca_certs"])
        except OSError as e:  # SSLError is one
            raise SettingError(f"the certificates cannot be used: {e}", hint="do key and certificate fit?") from e


def read_settings(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> ServeSettings:
    """Settings from ``flags`` (None values are not given), then ``CALIB_SERVE_*``, then the TOML file ``config``.

    Raises:
        SettingError: a value of the wrong type or range, or no ``models``; says where it was given.
        UnknownNameError: no such setting. MissingFileError, FormatError: the file cannot be read.
    """
    sources = {
        f"in {config}": {} if config is None else load_toml(config),
        _IN_ENVIRONMENT: _environment(),
        "on the command line": {k: v for k, v in (flags or {}).items() if v is not None},
    }
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, given in sources.items():
        for name, value in given.items():
            if name not in ServeSettings.model_fields:
                raise UnknownNameError(f"setting {source}", name, ServeSettings.model_fields)
            values[name], origin[name] = value, source
    try:
        return ServeSettings(**values)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0])
        place = f"setting '{name}' {origin[name]}" if name in origin else f"setting '{name}'"
        if origin.get(name) == _IN_ENVIRONMENT:
            place = PREFIX + name.upper()
        hint = "" if name in origin else f"give --{name}, or set {PREFIX}{name.upper()}"
        raise SettingError(f"{place}: {first['msg']}", hint=hint) from None


def _environment() -> dict[str, str]:
    return {k.removeprefix(PREFIX).lower(): v for k, v in os.environ.items() if k.startswith(PREFIX)}
