"""Pages in somebody's browser, control without a key, and keys that are guessed."""

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from calib.errors import SettingError
from calib.server.layers.access import Access, Buckets, Hosts, Keys, is_loopback
from calib.server.serve_settings import read_settings

from .test_guard import serving

Headers = dict[str, str]
LOAD, UNLOAD, INFER, GET = "/v2/repository/models/a/load", "/v2/repository/models/a/unload", "/v2/models/a/infer", "/v2"


def ask(
    layer: Access, path: str, headers: Headers | None = None, client: str = "127.0.0.1", method: str = "POST"
) -> tuple[int, Headers]:
    """What the layer answers, 200 where it hands on."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in ({"Host": "127.0.0.1:8000"} | (headers or {})).items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw, "client": (client, 1)}
    asyncio.run(layer(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


async def handed_on(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def layer(host: str = "127.0.0.1", *allowed: str, keys: tuple[list[str], list[str]] = ([], [])) -> Access:
    return Access(handed_on, Keys.of(*keys), None, Hosts(is_loopback(host), allowed))


EVIL = "evil.example"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "x"}, 200),
        ({"Host": ""}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Host": "LOCALHOST:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Origin": f"http://{EVIL}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "http://[", "Host": "["}, 421),
        ({"Host": EVIL}, 421),
        ({"Host": f"{EVIL}.:8000"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": f"{EVIL}:8000", "Origin": f"http://{EVIL}:8000"}, 421),
        ({"Host": "x", "Origin": "http://x"}, 421),
        ({"Host": "calib.example.org"}, 421),
    ],
)
@pytest.mark.parametrize("path", [LOAD, UNLOAD, INFER, GET])
def test_pages_of_others_are_refused(path: str, headers: Headers, code: int) -> None:
    assert ask(layer(), path, headers)[0] == code
    assert ask(layer(), "/v2/health/live", headers, method="GET")[0] == 200


def test_names_are_allowed_by_the_setting() -> None:
    ours = layer("127.0.0.1", "calib.example.org")
    for headers in (
        {"Host": "calib.example.org"},
        {"Host": "calib.example.org:8000", "Origin": "http://calib.example.org:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "https://calib.example.org"},  # a proxy that names itself
    ):
        assert ask(ours, INFER, headers)[0] == 200
    assert ask(ours, INFER, {"Host": "other.example.org"})[0] == 421
    assert ask(ours, INFER, {"Host": "calib.example.org", "Origin": f"http://{EVIL}"})[0] == 403
    public, named = layer("0.0.0.0"), layer("0.0.0.0", "calib.example.org")
    assert ask(public, INFER, {"Host": "other.example.org"}, "10.0.0.7")[0] == 200
    assert ask(named, INFER, {"Host": "other.example.org"}, "10.0.0.7")[0] == 421
    assert ask(public, INFER, {"Host": "a.example.org", "Origin": f"http://{EVIL}"}, "10.0.0.7")[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "localhost", "::1", "0.0.0.0", "::", "10.0.0.1", "a.org"])
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "10.0.0.7"])
def test_control_without_a_key_is_for_this_machine_alone(host: str, client: str) -> None:
    is_local = host in ("127.0.0.1", "127.0.0.7", "localhost", "::1") and client != "10.0.0.7"
    for path in (LOAD, UNLOAD):
        assert ask(layer(host), path, client=client)[0] == (200 if is_local else 403)
        for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
            assert ask(layer(host), path, {header: "for=1.2.3.4"}, client)[0] == 403, "it has come through a proxy"
        assert ask(layer(host, keys=([], ["k"])), path, {"X-API-Key": "k"}, client)[0] == 200
        assert ask(layer(host, keys=(["k"], [])), path, {"X-API-Key": "k"}, client)[0] == 403
    assert ask(layer(host), INFER, client=client)[0] == 200


def guess(layer: Access, key: str, client: str = "10.0.0.7") -> int:
    return ask(layer, INFER, {"X-API-Key": key}, client)[0]


def test_guessed_keys_are_slowed() -> None:
    ours = layer(keys=(["right", "other"], ["admin"]))
    assert guess(ours, "right") == 200
    codes = [guess(ours, f"k{k}") for k in range(100)]
    assert codes.count(401) <= 25 and codes[-1] == 429
    code, headers = ask(ours, INFER, {"X-API-Key": "k"}, "10.0.0.7")
    assert code == 429 and int(headers["retry-after"]) >= 1
    assert guess(ours, "other") == guess(ours, "admin") == 429, "whether a guess was right is not told"
    assert guess(ours, "right") == 200, "who has used a key from there goes on"
    assert guess(ours, "other", "10.0.0.8") == 200, "from elsewhere"
    assert ask(ours, INFER, client="10.0.0.7")[0] == 401, "no key is no guess"
    assert [guess(layer(keys=(["right"], [])), "right") for _ in range(50)] == [200] * 50


def test_an_address_of_ipv6_is_its_network() -> None:
    ours = layer(keys=(["right"], []))
    codes = [guess(ours, "wrong", f"2001:db8::{k:x}") for k in range(50)]
    assert codes[-1] == 429 and guess(ours, "wrong", "2001:db8:0:1::1") == 401
    codes = [guess(ours, "wrong", f"::ffff:10.0.0.{k}") for k in range(50)]
    assert codes == [401] * 50


def test_looking_into_a_bucket_takes_nothing() -> None:
    buckets = Buckets(1, 2)
    assert [buckets.wait(b"a", 0.0, cost=0) for _ in range(5)] == [0] * 5
    assert buckets.wait(b"a", 0.0) == buckets.wait(b"a", 0.0) == 0 and buckets.wait(b"a", 0.0, cost=0) == 1


@pytest.mark.parametrize("wrong", ["http://a.org", "a.org:80", "a.org,", "*", "a b"])
def test_allowed_hosts_are_names(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="allowed_hosts"):
        read_settings({"models": tmp_path, "allowed_hosts": wrong})
    assert read_settings({"models": tmp_path, "allowed_hosts": "A.org, b"}).allowed_hosts == ("a.org", "b")


def test_a_page_cannot_unload_and_the_log_says_who_can(tmp_path: Path) -> None:
    with serving(tmp_path) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        unload = "/v2/repository/models/linear/unload"
        simple = {"Origin": f"http://{EVIL}", "Content-Type": "text/plain"}
        assert http.post(unload, content="{}", headers=simple).status_code == 403
        assert http.post(unload, content="{}", headers={"Host": EVIL}).status_code == 421
        assert http.get("/v2/models/linear/ready").status_code == 200
        assert http.post(unload, content="{}").status_code == 200
        log = server.log.read_text()
        assert "loaded and unloaded by programs of this machine" in log and "names in Host: addresses, localhost" in log
