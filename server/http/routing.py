"""Which lookup a URL asks for. The same few URLs come thousands of times a second, so each is taken apart once."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

import httptools

from embstore.common.atomic_files import NUMBER
from server.http.problems import clip

LOOKUP, LOOKUP_MANY, INFER, HEALTH = "lookup", "lookup_many", "infer", "health"
MANY = "embstore"
"""The model that is all tables together."""
MAX_KNOWN = 4096
PROBES = ("livez", "readyz", "startupz")


class Route(NamedTuple):
    """A lookup call or probe, as its path says it."""

    kind: str
    table: str = ""
    version: int | None = None
    label: str | None = None
    release: str | None = None
    query: bytes = b""
    wrong: str = ""
    """What is wrong with the path, for a 400."""
    on_v2: bool = False
    """Errors go to clients of the Open Inference Protocol."""


class Routes:
    """Remembers the routes of URLs seen before; None stands for whatever FastAPI answers."""

    def __init__(self) -> None:
        self._known: dict[bytes, Route | None] = {}

    def find(self, url: bytes) -> Route | None:
        """The route of a request target as it stands in the request line."""
        try:
            return self._known[url]
        except KeyError:
            pass
        route = parse(url)
        if len(self._known) >= MAX_KNOWN:  # somebody walks through names: forget, rather than grow
            self._known.clear()
        if len(url) < 1024:
            self._known[url] = route
        return route


def parse(url: bytes) -> Route | None:
    """The route of a request target; None when it is neither a lookup nor a probe."""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        return None
    path, query = unquote((parsed.path or b"").decode("latin-1")), parsed.query or b""
    match path.split("/"):
        case ["", "v1", "lookup"]:
            return Route(LOOKUP_MANY, query=query)
        case ["", "v1", "releases", release, "lookup"]:
            return Route(LOOKUP_MANY, release=release, query=query)
        case ["", "v1", "tables", table, "lookup"]:
            return Route(LOOKUP, table, query=query)
        case ["", "v1", "tables", table, "labels", label, "lookup"]:
            return Route(LOOKUP, table, label=label, query=query)
        case ["", "v1", "tables", table, "versions", version, "lookup"]:
            return _numbered(Route(LOOKUP, table, query=query), version)
        case ["", "v2", "models", table, "infer"]:
            return Route(INFER, table, query=query, on_v2=True)
        case ["", "v2", "models", table, "versions", version, "infer"]:
            return _numbered(Route(INFER, table, query=query, on_v2=True), version)
        case ["", probe] if probe in PROBES:
            return Route(HEALTH, probe, query=query)
        case ["", "v2", "health", "live" | "ready" as probe]:
            return Route(HEALTH, f"{probe}z" if probe == "live" else "readyz", query=query, on_v2=True)
    return None


def _numbered(route: Route, version: str) -> Route:
    if not NUMBER.fullmatch(version):
        return route._replace(wrong=f"version {clip(version)} is not a version number")
    return route._replace(version=int(version))
