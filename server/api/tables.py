"""`GET /v1/tables...`: what is served, and the state of every version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from embstore.errors import NotReady
from embstore.table import Table
from server.api.schemas import Count, Positive, problems
from server.lookup.service import LookupService
from server.tables.registry import Registry
from server.tables.snapshot import State


class TableSummary(BaseModel):
    """A table and the version that serves it."""

    table: str
    version: Positive
    release: str | None
    scheme: str
    parameters: dict[str, Any] = Field(description="Parameters of the scheme.")
    num_embeddings: Positive
    embedding_dim: Positive
    id_space: str
    num_ids: Count
    num_bytes: Count = Field(description="What the arrays hold.")
    id_space_bytes: Count
    full_bytes: Count = Field(description="What a float32 row for every id would hold.")
    device: str
    created: str
    metrics: dict[str, Any] = Field(description="What was measured when the table was trained.")


class TableList(BaseModel):
    """Every table that is served."""

    tables: list[TableSummary]


class TableVersion(BaseModel):
    """State of one version."""

    version: Positive
    state: State
    reason: str | None = Field(description="Why it is not served; null where it is.")
    num_bytes: Count | None = Field(description="What the arrays hold, once loaded.")


class TableInFull(TableSummary):
    """A table with its labels, its cache and its versions."""

    labels: dict[str, Positive] = Field(description="Version of each label.")
    cache: dict[str, Any] = Field(description="What the cache in front of the table does, and what it measured.")
    versions: list[TableVersion]


class VersionList(BaseModel):
    """The versions of a table."""

    table: str
    versions: list[TableVersion]


def tables_router(tables: Registry, service: LookupService) -> APIRouter:
    """Everything under `GET /v1/tables`."""
    router = APIRouter(prefix="/v1/tables", tags=["tables"])

    @router.get("", responses=problems())
    def list_tables() -> TableList:
        """Every table now served, with what serves it."""
        check_started(tables)
        snapshot = tables.snapshot
        listed = sorted(snapshot.latest.items())
        return TableList(tables=[_summary(t, snapshot.release_of.get((name, t.version))) for name, t in listed])

    @router.get("/{table}", responses=problems(400, 404))
    def show_table(table: str) -> TableInFull:
        """One table: scheme, sizes, labels, and the state of each version known here."""
        check_started(tables)
        snapshot = tables.snapshot
        served = snapshot.table(table)
        cached = service.cached.get(served)
        return TableInFull(
            **_summary(served, snapshot.release_of.get((table, served.version))).model_dump(),
            labels={label: t.version for (name, label), t in snapshot.labels.items() if name == table},
            cache=cached.describe() if cached else {"mode": "off"},
            versions=_versions(tables, table),
        )

    @router.get("/{table}/versions", responses=problems(400, 404))
    def list_versions(table: str) -> VersionList:
        """State of each version of a table, and why it failed where it did."""
        check_started(tables)
        versions = _versions(tables, table)
        if not versions:
            tables.snapshot.table(table)  # says which tables there are
        return VersionList(table=table, versions=versions)

    return router


def check_started(tables: Registry) -> None:
    """NotReady before the first look at the store: a table that is not loaded yet is not unknown."""
    if not tables.started:
        raise NotReady("tables are still being loaded")


def _summary(table: Table, release: str | None) -> TableSummary:
    manifest = table.manifest
    assert manifest is not None
    return TableSummary(
        table=table.name,
        version=table.version,
        release=release,
        scheme=table.scheme.name,
        parameters=table.config.parameters(),
        num_embeddings=table.config.num_embeddings,
        embedding_dim=table.embedding_dim,
        id_space=table.ids.kind,
        num_ids=table.ids.num_ids,
        num_bytes=table.num_bytes,
        id_space_bytes=table.ids.num_bytes(),
        full_bytes=4 * table.config.num_embeddings * table.embedding_dim,
        device=table.device,
        created=manifest.created,
        metrics=manifest.metrics,
    )


def _versions(tables: Registry, name: str) -> list[TableVersion]:
    loaded, known = tables.snapshot.loaded, tables.status()
    return [
        TableVersion(
            version=version,
            state=status.state,
            reason=status.reason or None,
            num_bytes=loaded[key].num_bytes if (key := (name, version)) in loaded else None,
        )
        for (table, version), status in sorted(known.items())
        if table == name
    ]
