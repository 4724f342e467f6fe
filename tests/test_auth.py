"""API keys: lookups and metadata behind one, changes behind another, probes and metrics behind none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ServerProcess, serving

import embstore
from embstore.errors import ConfigError, Forbidden, Unauthorized
from embstore.schemes import Full
from server.auth import Keys

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
    """A key for lookups moves no label."""
    path = "/v1/tables/item/labels/stable"
    assert [status(server, "PUT", path, key) for key in (None, KEY, ADMIN)] == [401, 401, 200]


def test_without_an_admin_key_changes_are_for_this_machine_alone() -> None:
    """Loopback, named as such, not through a proxy and not from somebody else's page."""
    local = Keys([], [], host="127.0.0.1")
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
        Keys([], [], host="0.0.0.0").check_admin({b"host": b"localhost"})
    with pytest.raises(Unauthorized):
        Keys([b"key-of-one"], [], host="127.0.0.1").check_admin({b"host": b"localhost"})


@pytest.mark.parametrize(("text", "why"), [("", "holds no key"), ("short\n", "fewer than 8"), (None, "No such file")])
def test_a_keys_file_that_opens_nothing_is_an_error(tmp_path: Path, text: str | None, why: str) -> None:
    """A mistake in it must not leave the door open."""
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        Keys.read(path, None, host="127.0.0.1")
