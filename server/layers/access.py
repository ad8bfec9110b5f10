"""Who may ask, and how often: keys compared in constant time, and a bucket of requests per key.

A pure ASGI layer: what it refuses costs neither a body nor a route.
"""

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .asgi import Application, Receive, Scope, Send, refuse

OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")  # an orchestrator has no key
ADMIN_SUFFIXES = ("/load", "/unload")
_MAX_CALLERS = 10_000


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

    def wait(self, caller: bytes, now: float) -> float:
        """0 if the caller may ask now, which takes a token; else seconds until it may."""
        tokens, then = self._left.pop(caller, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        allowed = tokens >= 1
        self._left[caller] = (tokens - allowed, now)
        if len(self._left) > _MAX_CALLERS:
            self._left.popitem(last=False)  # the one that was silent longest has a full bucket again
        return 0.0 if allowed else (1 - tokens) / self._rate


class Access:
    """Answers 401, 403 and 429 itself; hands everything else on."""

    def __init__(self, app: Application, keys: Keys, buckets: Buckets | None) -> None:
        self._app, self._keys, self._buckets = app, keys, buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        key = _key(scope)
        refused = self._refusal(scope, key)
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await refuse(send, *refused)

    def _refusal(self, scope: Scope, key: bytes | None) -> tuple[int, str, dict[str, str]] | None:
        keys = self._keys
        if keys.users or keys.admins:
            is_admin = keys.knows(key, keys.admins)
            if not is_admin and not keys.knows(key, keys.users):
                text = "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
                return 401, text if key is None else "this key is not known", {"WWW-Authenticate": "Bearer"}
            if _is_admin_path(scope) and not is_admin:
                return 403, "loading and unloading need an admin key", {}
        if self._buckets is not None:
            # Only a key that was checked names its caller: others could be made up at will.
            known = key if keys.users or keys.admins else None
            caller = known or str((scope.get("client") or ("",))[0]).encode()
            seconds = self._buckets.wait(caller, time.monotonic())
            if seconds > 0:
                return (
                    429,
                    "too many requests: wait as long as Retry-After says",
                    {"Retry-After": str(int(seconds) + 1)},
                )
        return None


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
