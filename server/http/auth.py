"""API keys: who may look up, who may change what is served. Keys come from files, are compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request

from embstore.common.api_keys import read_api_keys
from embstore.errors import ConfigError, Forbidden, Unauthorized

MIN_KEY_BYTES = 8
_FORWARDED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")
OPEN_PATHS = ("/metrics", "/docs", "/openapi.json", "/docs/oauth2-redirect", "/redoc")
"""Beside probes, what needs no key: metrics, for who runs the server, and the documentation."""


class ApiKeys:
    """Keys for calls and for administration; an admin key opens both."""

    def __init__(self, keys: list[bytes], admin_keys: list[bytes], *, host: str) -> None:
        self._any, self._admin = [*keys, *admin_keys] if keys else [], admin_keys
        self.open = not keys
        """Lookups need no key."""
        self._local = _is_loopback(host)

    @staticmethod
    def read(keys: Path | None, admin_keys: Path | None, *, host: str) -> ApiKeys:
        """Keys of files, one a line; ConfigError says what is wrong with a file."""
        return ApiKeys(_read(keys), _read(admin_keys), host=host)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Unauthorized unless the call carries a key, where keys are needed."""
        if not self.open:
            _check_known(self._any, _given(headers), "API key")

    def check_admin(self, headers: Mapping[bytes, bytes], *, over_uds: bool = False) -> None:
        """Unauthorized without a key that is known, Forbidden unless it may change what is served.

        Whoever may write to the server's Unix-domain socket is on this machine (`over_uds`), wherever TCP listens.
        """
        if not self._admin:
            if not (self._local or over_uds):
                raise Forbidden(
                    "admin calls are disabled: the server is bound to a non-loopback address and "
                    "admin_keys_file is not set"
                )
            if not _is_from_here(headers):
                raise Forbidden(
                    "admin calls without admin_keys_file are accepted only from loopback "
                    "(Host must be localhost, no forwarding headers)"
                )
            self.check(headers)
            return
        given = _given(headers)
        _check_known([*self._any, *self._admin], given, "admin API key")
        if not _holds(self._admin, given):
            raise Forbidden("admin API key required (keys are listed in admin_keys_file)")

    def check_local(self, headers: Mapping[bytes, bytes]) -> None:
        """Forbidden unless a program on this machine calls: for calls that use its memory."""
        if not self._local:
            raise Forbidden("shared memory is disabled: the server is bound to a non-loopback address")
        if not _is_from_here(headers):
            raise Forbidden(
                "shared memory is accepted only from loopback (Host must be localhost, no forwarding headers)"
            )


def require_admin(request: Request) -> None:
    """FastAPI dependency of the calls that change what is served."""
    keys: ApiKeys = request.app.state.keys
    keys.check_admin(dict(request.scope["headers"]), over_uds=request.scope.get("over_uds", False))


def _is_from_here(headers: Mapping[bytes, bytes]) -> bool:
    """False when a call may come through a proxy, or from a web page of somebody else's, open on this machine."""
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
    foreign = origin is not None and origin.decode("latin-1").partition("://")[2] != host
    return not foreign and _names_loopback(host) and not any(name in headers for name in _FORWARDED)


@lru_cache(256)
def _names_loopback(host: str) -> bool:
    """Whether a Host header names this machine by its loopback address."""
    try:
        return _is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _given(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a call carries, b"" where there is none."""
    given = headers.get(b"x-api-key")
    if given is None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return b""
    return given.strip()


def _check_known(keys: list[bytes], given: bytes, needed: str) -> None:
    """Unauthorized unless what is given is one of the keys."""
    if not given:
        raise Unauthorized(f"{needed} required (send `Authorization: Bearer KEY` or `X-API-Key: KEY`)")
    if not _holds(keys, given):
        raise Unauthorized(f"unknown API key; {needed} required")


def _holds(keys: list[bytes], given: bytes) -> bool:
    found = False
    for key in keys:  # all of them, so that the time says nothing
        found |= hmac.compare_digest(key, given)
    return found


def _read(path: Path | None) -> list[bytes]:
    if path is None:
        return []
    try:
        keys = [key.encode() for key in read_api_keys(path)]
    except ConfigError as error:
        raise ConfigError(f"keys file {error}") from error
    if any(len(key) < MIN_KEY_BYTES for key in keys):
        raise ConfigError(f"keys file {path} holds a key of fewer than {MIN_KEY_BYTES} characters")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
