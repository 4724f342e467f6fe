"""API keys: lookups and metadata behind one, changes behind another, probes and metrics behind none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.serving import ServerProcess, serving

import embstore
from embstore.errors import ConfigError, Forbidden, Unauthorized
from embstore.schemes import Full
from server.http.auth import ApiKeys

KEY, ADMIN = "a-lookup-key", "an-admin-key"
LOOKUP = "/v1/tables/item/lookup"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with both kinds of keys."""
    folder = tmp_path_factory.mktemp("auth")
    embstore.open_store(folder / "store").publish("item", Full(10, 4))
    (folder / "keys").write_text(f"# for rankers\n{KEY}\n")
    (folder / "admin").write_text(f"{ADMIN}\n")
    flags = {"api_keys_file": folder / "keys", "admin_keys_file": folder / "admin"}
    with serving(folder / "store", folder / "log", **flags) as running:
        yield running


def refusal(server: ServerProcess, method: str, path: str, key: str | None) -> tuple[int, str]:
    """Status and text of a call that is refused."""
    headers = {} if key is None else {"X-API-Key": key}
    reply = httpx.request(method, server.url + path, json={"version": 1}, headers=headers)
    return reply.status_code, reply.json()["detail"]


def status(server: ServerProcess, method: str, path: str, key: str | None, bearer: bool = False) -> int:
    """What a call answers with this key."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"} if bearer else {"X-API-Key": key}
    body = {"version": 1} if method == "PUT" else {"ids": [1]} if path.endswith("lookup") else None
    return httpx.request(method, server.url + path, json=body, headers=headers).status_code


@pytest.mark.parametrize("path", [LOOKUP, "/v1/tables", "/v1/tables/item", "/v2", "/v2/models/item", "/unknown"])
def test_calls_need_a_key(server: ServerProcess, path: str) -> None:
    """Without one, or with a wrong one, 401 and how to send it; an admin key opens them too."""
    method = "POST" if path == LOOKUP else "GET"
    right = 404 if path == "/unknown" else 200
    assert status(server, method, path, None) == status(server, method, path, "a-lookup-kez") == 401
    assert status(server, method, path, KEY) == status(server, method, path, KEY, bearer=True) == right
    assert status(server, method, path, ADMIN) == right
    reply = httpx.request(method, server.url + path)
    assert (reply.json()["code"], reply.headers["www-authenticate"]) == ("unauthorized", 'Bearer realm="embstore"')


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/metrics"])
def test_probes_and_metrics_need_none(server: ServerProcess, path: str) -> None:
    """Whoever runs the server is not locked out."""
    assert status(server, "GET", path, None) == 200


def test_changes_need_an_admin_key(server: ServerProcess) -> None:
    """A key for lookups moves no label, and loads no table; who holds one is told that it is the wrong kind."""
    path, load = "/v1/tables/item/labels/stable", "/v2/repository/models/item/load"
    assert [status(server, "PUT", path, key) for key in (None, "nobodys-key", KEY, ADMIN)] == [401, 401, 403, 200]
    assert [status(server, "POST", load, key) for key in (None, "nobodys-key", KEY, ADMIN)] == [401, 401, 403, 200]
    code, text = refusal(server, "PUT", path, KEY)
    assert (code, text) == (403, "admin API key required (keys are listed in admin_keys_file)")


@pytest.mark.parametrize("path", [LOOKUP, "/v1/tables/item/labels/stable", "/v1/tables"])
def test_a_wrong_key_is_told_from_none(server: ServerProcess, path: str) -> None:
    """401 both, but who sent a key learns that it came and is not known."""
    method = "PUT" if "labels" in path else "POST" if path == LOOKUP else "GET"
    assert refusal(server, method, path, "nobodys-key") == (
        401,
        "unknown API key; API key required",
    )
    for none in (None, ""):
        code, text = refusal(server, method, path, none)
        assert (code, text[:16]) == (401, "API key required")


def test_admin_calls_without_keys_for_lookups() -> None:
    """Where lookups are open, no key, a wrong one and an admin key are three different things too."""
    keys = ApiKeys([], [b"an-admin-key"], host="0.0.0.0")
    keys.check_admin({b"x-api-key": b"an-admin-key"})
    with pytest.raises(Unauthorized, match=r"^admin API key required"):
        keys.check_admin({})
    with pytest.raises(Unauthorized, match="unknown API key; admin API key required"):
        keys.check_admin({b"x-api-key": b"nobodys-key"})


def test_without_an_admin_key_changes_are_for_this_machine_alone() -> None:
    """Loopback, named as such, not through a proxy and not from somebody else's page."""
    local = ApiKeys([], [], host="127.0.0.1")
    local.check_admin({b"host": b"localhost:8000"})
    local.check_admin({b"host": b"[::1]:8000", b"origin": b"http://[::1]:8000"})
    for headers in (
        {b"host": b"evil.example:8000"},
        {b"host": b"localhost", b"origin": b"http://evil.example"},
        {b"host": b"localhost", b"x-forwarded-for": b"10.0.0.1"},
        {b"host": b"["},
        {},
    ):
        with pytest.raises(Forbidden):
            local.check_admin(headers)
    with pytest.raises(Forbidden):
        ApiKeys([], [], host="0.0.0.0").check_admin({b"host": b"localhost"})
    with pytest.raises(Unauthorized):
        ApiKeys([b"key-of-one"], [], host="127.0.0.1").check_admin({b"host": b"localhost"})


@pytest.mark.parametrize(
    ("text", "why"), [("", "no API key found"), ("short\n", "fewer than 8"), (None, "No such file")]
)
def test_a_keys_file_that_opens_nothing_is_an_error(tmp_path: Path, text: str | None, why: str) -> None:
    """A mistake in it must not leave the door open."""
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        ApiKeys.read(path, None, host="127.0.0.1")
