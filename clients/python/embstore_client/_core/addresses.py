"""Addresses of servers, as a caller gives them: `http://`, `https://`, or `unix:///path/of/a/socket`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote, unquote

import httpx

UNIX = "unix://"
MAX_PATH_BYTES = 107
"""The longest path that the system takes for a socket."""


def check_base_urls(base_url: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses, each once, in order; ValueError names one that no call could work with."""
    urls = (base_url,) if isinstance(base_url, str) else tuple(base_url)
    if not urls:
        raise ValueError("base_url must be one URL or several, got none")
    return tuple(dict.fromkeys(_check_base_url(url) for url in urls))


@lru_cache(maxsize=256)
def url_and_socket(base_url: str, target: str) -> tuple[httpx.URL, str | None]:
    """What is asked, and the path of the Unix-domain socket that leads there; None for TCP.

    URLs repeat from call to call, and httpx takes long to make one.
    """
    if base_url.startswith(UNIX):
        return httpx.URL("http://localhost" + target), unquote(base_url.removeprefix(UNIX))
    return httpx.URL(base_url + target), None


def _check_base_url(base_url: str) -> str:
    """The URL without its last slash; credentials would reach logs and messages, so it must have none."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url is not a URL: {error}") from error
    if url.userinfo:
        raise ValueError("base_url must not hold credentials; pass api_key=")
    if url.query or url.fragment:
        raise ValueError(f"base_url must end with its path, without ? or #, got {base_url!r}")
    if url.scheme == "unix":
        return _check_socket(base_url, url)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url must start with http://, https:// (and name a host) or unix:///, got {base_url!r}")
    return str(url).rstrip("/")


def _check_socket(base_url: str, url: httpx.URL) -> str:
    """`unix://` and the absolute path of a socket."""
    if url.host or not url.path.strip("/"):
        raise ValueError(f"base_url must name a socket by its absolute path, unix:///run/name.sock, got {base_url!r}")
    if len(os.fsencode(url.path)) > MAX_PATH_BYTES:
        raise ValueError(f"base_url: a socket's path has at most {MAX_PATH_BYTES} bytes, got {base_url!r}")
    return UNIX + quote(url.path)
