"""Calls that change what is served: moving a label."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from embstore.errors import BadRequest, BodyTooLarge, ConfigError, Conflict, NotReady, StoreError, Unprocessable
from embstore.store.local import check_label
from server.http.auth import require_admin
from server.tables.registry import Registry

MAX_BYTES = 64 << 10
LOOK_SECONDS = 5.0
_ERRORS = {
    400: "Malformed",
    401: "An admin key is needed",
    403: "The key is for lookups alone, or changes are off here",
    404: "No such table",
    409: "The version is not ready here",
    413: "Too many bytes",
    422: "A value is not allowed",
    503: "The store cannot be written",
}


class Move(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a call that moves a label."""

    version: int


def admin_router(tables: Registry) -> APIRouter:
    """`PUT /v1/tables/{table}/labels/{label}`."""
    router = APIRouter(tags=["admin"], dependencies=[Depends(require_admin)])
    body = {
        "type": "object",
        "required": ["version"],
        "additionalProperties": False,
        "properties": {"version": {"type": "integer", "minimum": 1}},
    }

    @router.put(
        "/v1/tables/{table}/labels/{label}",
        responses={status: {"description": text} for status, text in _ERRORS.items()},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}},
    )
    async def move_label(table: str, label: str, request: Request) -> Response:
        """Point a label at a version that is loaded and ready here; 409 when it is not."""
        try:
            move = msgspec.json.decode(await read_body(request), type=Move)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"body: {error}") from error
        return as_json(await run_in_threadpool(_move, tables, table, label, move.version))

    return router


def _move(tables: Registry, table: str, label: str, version: int) -> dict[str, Any]:
    """The label as it is afterwards; other processes that serve the store follow at their next look at it."""
    try:
        check_label(label)
    except ConfigError as error:
        raise Unprocessable(str(error), table=table) from error
    check_ready(tables, table, version)
    try:
        with tables.store.turn():
            tables.store.set_label(table, label, version)
    except StoreError as error:
        raise NotReady(str(error), table=table) from error
    tables.look(LOOK_SECONDS)
    served = tables.snapshot.labels.get((table, label))
    return {"table": table, "label": label, "version": version, "served": served.version if served else None}


def check_ready(tables: Registry, table: str, version: int) -> None:
    """Conflict unless this version of a table can be served here and now; TableNotFound when nobody knows the table."""
    if (table, version) in tables.snapshot.loaded:
        return
    status = tables.status().get((table, version))
    if status is None:
        tables.check_known(table)
        why = "it is not loaded here"
    else:
        why = f"it is {status.state} here" + (f": {status.reason}" if status.reason else "")
    ready = sorted(n for name, n in tables.snapshot.loaded if name == table)
    shown = ", ".join(map(str, ready)) or "none"
    detail = f"table {table!r} version {version} is not ready: {why}; ready are {shown}"
    raise Conflict(detail, table=table, version=version)


async def read_body(request: Request) -> bytes:
    """The whole of a small body."""
    parts, num_bytes = [], 0
    async for part in request.stream():
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > MAX_BYTES:
            raise BodyTooLarge(f"the body has more than {MAX_BYTES:,} bytes, which is the limit here", limit=MAX_BYTES)
    return b"".join(parts)


def as_json(value: Any) -> Response:
    """A reply of JSON."""
    return Response(orjson.dumps(value), media_type="application/json")
