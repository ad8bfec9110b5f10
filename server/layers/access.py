"""Who may ask, and how often: hosts and origins, keys compared in constant time, and a bucket of requests per key.

A pure ASGI layer: what it refuses costs neither a body nor a route. A page in somebody's browser can send requests to
every address that the browser reaches: it has an origin that is not ours, or has given us a name of its own (DNS
rebinding).
"""

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from .asgi import Application, Receive, Scope, Send, refuse

OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # an orchestrator has no key
ADMIN_SUFFIXES = ("/load", "/unload")
_MAX_CALLERS = 10_000
_GUESSES_PER_S, _GUESSES = 1.0, 20  # unknown keys of an address, and at once
_FORWARDED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")

Refusal = tuple[int, str, dict[str, str]]


@dataclass(frozen=True)
class Keys:
    """Digests of the keys that are known; none at all means that everybody may ask."""

    users: tuple[bytes, ...]
    admins: tuple[bytes, ...]

    @classmethod
    def of(cls, users: Sequence[str], admins: Sequence[str]) -> "Keys":
        return cls(*(tuple(_digest(key.encode()) for key in keys) for keys in (users, admins)))

    def knows(self, key: bytes | None, digests: tuple[bytes, ...]) -> bool:
        """Compared with every known key, whichever fits, in the same time."""
        digest = _digest(key or b"")
        found = False
        for known in digests:
            found |= hmac.compare_digest(digest, known)
        return found and key is not None


class Buckets:
    """Token buckets: ``rate`` requests a second for each caller, ``burst`` at once."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # caller -> tokens, when

    def wait(self, caller: bytes, now: float, cost: int = 1) -> float:
        """0 if the caller may ask now, which takes ``cost`` tokens; else seconds until it may."""
        tokens, then = self._left.pop(caller, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        allowed = tokens >= 1
        self._left[caller] = (tokens - cost * allowed, now)
        if len(self._left) > _MAX_CALLERS:
            self._left.popitem(last=False)  # the one that was silent longest has a full bucket again
        return 0.0 if allowed else (1 - tokens) / self._rate


@dataclass(frozen=True)
class Hosts:
    """Under which names the service is asked: addresses, ``localhost`` and ``allowed``.

    No others where it listens on loopback or ``allowed`` is given; but programs, which send no Origin, may use names
    without a dot, which nobody can register.
    """

    loopback: bool
    allowed: tuple[str, ...] = ()

    def refusal(self, scope: Scope) -> Refusal | None:
        """421 or 403 for a request that a foreign page may have sent."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        name = _name(f"//{host}")
        if (self.loopback or self.allowed) and not self._knows(name) and (origin or "." in name.rstrip(".")):
            return 421, f"'{name[:64]}' is not a name of this service: the setting allowed_hosts lists them", {}
        if origin and origin.partition("://")[2] != host and _name(origin) not in self.allowed:
            return (
                403,
                f"the origin '{origin[:64]}' is foreign: the setting allowed_hosts lists our names",
                {},
            )
        return None

    def _knows(self, name: str) -> bool:
        return name in self.allowed or name == "localhost" or _is_address(name)

    def is_local(self, scope: Scope) -> bool:
        """Whether a request comes from this machine, as far as one can tell."""
        client = (scope.get("client") or ("",))[0]
        forwarded = any(name in _FORWARDED for name, _ in scope["headers"])
        return self.loopback and is_loopback(client) and not forwarded


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return url  # no name of ours


class Access:
    """Answers 401, 403, 421 and 429 itself; hands everything else on."""

    def __init__(self, app: Application, keys: Keys, buckets: Buckets | None, hosts: Hosts) -> None:
        self._app, self._keys, self._buckets, self._hosts = app, keys, buckets, hosts
        self._guesses = Buckets(_GUESSES_PER_S, _GUESSES)
        self._accepted: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()  # address and digest of a known key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await refuse(send, *refused)

    def _refusal(self, scope: Scope) -> Refusal | None:
        key, keys, address = _key(scope), self._keys, _address(scope)
        if (refused := self._hosts.refusal(scope)) is not None:
            return refused
        is_admin = keys.knows(key, keys.admins)
        if keys.users or keys.admins:
            is_known = is_admin or keys.knows(key, keys.users)
            if key is not None and (seconds := self._guessing(address, key, is_known)):
                return _too_many("this address has sent too many unknown keys", seconds)
            if not is_known:
                text = "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
                return 401, text if key is None else "this key is not known", {"WWW-Authenticate": "Bearer"}
        if _is_admin_path(scope) and not is_admin and (keys.users or keys.admins or not self._hosts.is_local(scope)):
            return 403, "loading and unloading need an admin key: the setting admin_keys", {}
        if self._buckets is not None:
            # Only a key that was checked names its caller: others could be made up at will.
            known = key if keys.users or keys.admins else None
            if seconds := self._buckets.wait(known or address, time.monotonic()):
                return _too_many("too many requests", seconds)
        return None

    def _guessing(self, address: bytes, key: bytes, is_known: bool) -> float:
        """Seconds that an address must wait before we say of another key whether it is known.

        A key that it has used before is not held up by what others send from there.
        """
        used = address, _digest(key)
        if used in self._accepted:
            self._accepted.move_to_end(used)
            return 0.0
        seconds = self._guesses.wait(address, time.monotonic(), cost=not is_known)
        if is_known and not seconds:
            self._accepted[used] = None
            if len(self._accepted) > _MAX_CALLERS:
                self._accepted.popitem(last=False)
        return seconds


def _too_many(text: str, seconds: float) -> Refusal:
    return 429, f"{text}: wait as long as Retry-After says", {"Retry-After": str(int(seconds) + 1)}


def _address(scope: Scope) -> bytes:
    """The client's; of IPv6 the network, in which one client has as many addresses as it likes."""
    client = str((scope.get("client") or ("",))[0])
    if _is_address(client) and isinstance(address := ip_address(client), IPv6Address):
        client = str(address.ipv4_mapped or ip_network((address.packed[:8] + bytes(8), 64)))
    return client.encode()


def _is_admin_path(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith("/v2/repository/models/") and path.endswith(ADMIN_SUFFIXES)


def _key(scope: Scope) -> bytes | None:
    headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")}
    if b"x-api-key" in headers:
        key: bytes = headers[b"x-api-key"]
        return key
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" and key.strip() else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
