"""`embstore lookup`: ids to vectors, from a running server or straight from a store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from embstore.common.api_keys import check_api_key, read_api_keys
from embstore.common.options import JsonOption, TableArgument, VersionOption
from embstore.common.render import columns, show
from embstore.errors import ConfigError, EmbstoreError, NotFound
from embstore.publish.command import opened_store

if TYPE_CHECKING:
    from rich.table import Table

KEY_VARIABLE = "EMBSTORE_API_KEY"


class Found(NamedTuple):
    """Vectors [B, D] in the order of the ids, which of them exist, and the version that answered."""

    vectors: list[list[float]]
    found: list[bool]
    version: int


def lookup(
    table: TableArgument,
    ids: Annotated[list[str], typer.Argument(help="Ids as the table has them; put -- before negative ones.")],
    store: Annotated[Path | None, typer.Option(help="Read this store directly, without a server.")] = None,
    url: Annotated[
        str, typer.Option(help="Ask a server, unless --store is given; unix:///path too.")
    ] = "http://127.0.0.1:8000",
    version: VersionOption = "latest",
    on_missing: Annotated[str, typer.Option(help="zero, default, error or hash.")] = "zero",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the API key in its first line that is no comment; or set {KEY_VARIABLE}."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Look ids up, in a running server or directly in a store."""
    if store is None:
        answer = _lookup_over_http(url, _api_key(api_key_file), table, ids, version, on_missing)
    elif api_key_file is not None:
        raise ConfigError("--api-key-file is for a server, --store reads without one: leave one of them out")
    else:
        answer = _lookup_in_store(store, table, ids, version, on_missing)
    about = {"table": table, "version": answer.version, "vectors": answer.vectors, "found": answer.found}
    show(json, about, lambda: _shown(table, ids, answer))


def _shown(table: str, ids: list[str], answer: Found) -> Table:
    """Ids with the beginning of their vectors."""
    rows, title = answer.vectors, f"{table} v{answer.version}"
    shown = columns("id", "found", f"vector ({len(rows[0])} floats)" if rows else "vector", title=title)
    for one, row, there in zip(ids, rows, answer.found, strict=True):
        text = ", ".join(f"{x:.4f}" for x in row[:6]) + (", ..." if len(row) > 6 else "")
        shown.add_row(one, "yes" if there else "no", text)
    return shown


def _lookup_in_store(store: Path, table: str, ids: list[str], version: str, on_missing: str) -> Found:
    loaded = opened_store(store).load(table, version)
    typed = ids if loaded.ids.id_type is str else _integers(table, ids)
    vectors, found = loaded.lookup(typed, return_found=True, on_missing=on_missing)
    return Found(vectors.tolist(), found.tolist(), loaded.version)


def _integers(table: str, ids: list[str]) -> list[int]:
    for text in ids:
        if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(1 << 63) <= int(text) < 1 << 63:
            raise ConfigError(f"table {table!r} has 64-bit integer ids, got {text!r}")
    return [int(text) for text in ids]


def _api_key(file: Path | None) -> str:
    """The key for a server: of the file, else of the environment, else none; ConfigError when it cannot be sent."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        check_api_key(key, KEY_VARIABLE)
        return key
    try:
        return read_api_keys(file)[0]
    except ConfigError as error:
        raise ConfigError(f"--api-key-file {error}") from error


def _lookup_over_http(url: str, key: str, table: str, ids: list[str], version: str, on_missing: str) -> Found:
    from urllib.parse import unquote

    import httpx

    ref = "" if version == "latest" else f"/versions/{version}" if version.isdecimal() else f"/labels/{version}"
    body = {"ids": ids, "on_missing": on_missing, "found": True}
    try:
        headers = {"x-api-key": key} if key else {}
        uds = unquote(url.removeprefix("unix://")) if url.startswith("unix://") else None
        base = url if uds is None else "http://localhost"
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds) if uds else None, timeout=10) as client:
            reply = client.post(f"{base}/v1/tables/{table}{ref}/lookup", json=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EmbstoreError(f"no answer from {url}: {error}; is the server running?") from error
    try:
        answer = reply.json()
        if reply.status_code == 200:
            return Found(answer["vectors"], answer["found"], answer["version"])
        detail = str(answer["detail"])
    except (ValueError, KeyError, TypeError) as error:
        raise EmbstoreError(f"{url} answers {reply.status_code}, but not as an embstore server does") from error
    if reply.status_code == 401:
        detail += f"; --api-key-file or {KEY_VARIABLE} gives one"
    raise (NotFound if reply.status_code == 404 else EmbstoreError)(detail)
