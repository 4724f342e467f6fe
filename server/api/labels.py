"""Calls that change what is served: moving a label."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from embstore.errors import BadRequest, ConfigError, Conflict, NotReady, StoreError, Unprocessable
from embstore.store.local import check_label
from server.api.schemas import Positive, body, problems
from server.http.auth import require_admin
from server.http.body import read_body
from server.tables.registry import Registry

MAX_BYTES = 64 << 10
LOOK_SECONDS = 5.0


class LabelMove(msgspec.Struct, forbid_unknown_fields=True):
    """The version that a label is to point at."""

    version: int


class Label(BaseModel):
    """Where a label points."""

    table: str
    label: str
    version: Positive
    served: Positive | None = Field(description="Version that the label answers with here and now.")


def labels_router(tables: Registry) -> APIRouter:
    """`PUT /v1/tables/{table}/labels/{label}`."""
    router = APIRouter(tags=["admin"], dependencies=[Depends(require_admin)])

    @router.put(
        "/v1/tables/{table}/labels/{label}",
        responses=problems(400, 403, 404, 409, 413, 422),
        openapi_extra=body("LabelMove"),
    )
    async def move_label(table: str, label: str, request: Request) -> Label:
        """Point a label at a version that is loaded and ready here; 409 when it is not."""
        try:
            move = msgspec.json.decode(await read_body(request.stream(), MAX_BYTES), type=LabelMove)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"body: {error}") from error
        return await run_in_threadpool(_move, tables, table, label, move.version)

    return router


def _move(tables: Registry, table: str, label: str, version: int) -> Label:
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
    return Label(table=table, label=label, version=version, served=served.version if served else None)


def check_ready(tables: Registry, table: str, version: int) -> None:
    """Conflict unless this version of a table can be served here and now; TableNotFound when the table is unknown."""
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
