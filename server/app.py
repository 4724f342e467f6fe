"""The application: parts made from settings, wired once, nothing global."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from embstore import __version__
from embstore.errors import ConfigError, EmbstoreError
from embstore.publish import open_store
from embstore.store import LATEST
from embstore.table import Table, check_golden
from server.cache import RowCache, start_embedded
from server.hotpath import HotPath
from server.lookup import LookupService
from server.metrics import Metrics
from server.openapi import with_lookups
from server.preread import Preread
from server.problems import MEDIA_TYPE, problem, problem_of
from server.settings import EMBEDDED, Settings
from server.tables import Registry

log = structlog.get_logger()


def create_app(settings: Settings, preread: Preread | None = None) -> HotPath:
    """The server as one ASGI app: lookups in front, FastAPI behind, tables watched from start-up to shutdown."""
    metrics = Metrics()
    tables = Registry(
        open_store(settings.store),
        metrics,
        device=_device(settings.device),
        keep_versions=settings.keep_versions,
        poll_seconds=settings.poll_seconds,
        preread=preread,
    )
    metrics.watch(tables)
    service = LookupService(inline_ids=settings.inline_ids)
    api = _api(settings, tables, service, metrics)
    app = HotPath(
        api,
        tables,
        service,
        metrics,
        max_ids=settings.max_ids,
        max_body_bytes=settings.max_body_bytes,
        max_reply_bytes=settings.max_reply_bytes,
    )
    api.state.draining = lambda: app.draining
    return app


def _device(asked: str) -> str:
    """cpu or cuda; ConfigError when cuda was asked for and is not there."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device on this machine")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _api(settings: Settings, tables: Registry, service: LookupService, metrics: Metrics) -> FastAPI:
    """Everything that is not a lookup."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tables.start()
        async with _cache(settings, metrics) as service.cache:
            yield
        tables.stop()

    api = FastAPI(
        title="embstore",
        version=__version__,
        summary="Embedding tables in a fraction of the space.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    plain_openapi = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = with_lookups(plain_openapi())
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    _add_errors(api)
    _add_tables(api, tables)
    _add_probes(api, tables)

    @api.get("/metrics", tags=["operations"], response_class=Response)
    def show_metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return api


@asynccontextmanager
async def _cache(settings: Settings, metrics: Metrics) -> AsyncIterator[RowCache | None]:
    """The Redis tier, if it is switched on; an embedded Valkey runs as long as the server does."""
    embedded = start_embedded() if settings.redis == EMBEDDED else None
    url = embedded.connection_url if embedded else settings.redis
    cache = None
    if settings.cache == "on" and url is not None:
        timeout_s = settings.redis_timeout_ms / 1000
        cache = RowCache(url, metrics.lookups, timeout_s=timeout_s, ttl_seconds=settings.cache_ttl_seconds)
    try:
        yield cache
    finally:
        if cache is not None:
            await cache.close()
        if embedded is not None:
            embedded.stop()


def _add_tables(api: FastAPI, tables: Registry) -> None:
    @api.get("/v1/tables", tags=["tables"])
    def list_tables() -> Response:
        """Every table now served, with what serves it."""
        snapshot = tables.snapshot
        return _json(
            {
                "tables": [
                    _describe(t, snapshot.release_of.get((n, t.version))) for n, t in sorted(snapshot.latest.items())
                ]
            }
        )

    @api.get("/v1/tables/{table}", tags=["tables"])
    def show_table(table: str) -> Response:
        """One table: scheme, sizes, labels, and the state of each version known here."""
        snapshot = tables.snapshot
        served = snapshot.table(table)
        labels = {label: t.version for (name, label), t in snapshot.labels.items() if name == table}
        about = _describe(served, snapshot.release_of.get((table, served.version)))
        return _json(about | {"labels": labels, "versions": _versions(tables, table)})

    @api.get("/v1/tables/{table}/versions", tags=["tables"])
    def list_versions(table: str) -> Response:
        """State of each version of a table, and why it failed where it did."""
        versions = _versions(tables, table)
        if not versions:
            tables.snapshot.table(table)  # says which tables there are
        return _json({"table": table, "versions": versions})


def _add_probes(api: FastAPI, tables: Registry) -> None:
    @api.get("/livez", tags=["operations"])
    async def livez() -> Response:
        """The process runs and answers."""
        return _json({"status": "ok"})

    @api.get("/startupz", tags=["operations"])
    async def startupz() -> Response:
        """The store was looked at for the first time."""
        return _health([] if tables.started else ["tables are still being loaded"])

    @api.get("/readyz", tags=["operations"])
    def readyz() -> Response:
        """Traffic is welcome: every table served has just answered a real lookup with the right vectors."""
        reasons = ["shutting down"] if api.state.draining() else []
        if not tables.started:
            reasons.append("tables are still being loaded")
        elif not tables.snapshot.latest:
            reasons.append(tables.problem or f"no table with a label {LATEST!r} could be loaded from the store")
        for table in tables.snapshot.latest.values():
            try:
                check_golden(table)
            except EmbstoreError as error:
                reasons.append(str(error))
        snapshot = tables.snapshot
        return _health(reasons, {n: t.version for n, t in snapshot.latest.items()}, sorted(snapshot.unserved))


def _add_errors(api: FastAPI) -> None:
    """The same problem bodies as the lookup calls have."""

    def reply(answer: tuple[int, bytes]) -> Response:
        status, body = answer
        return Response(body, status, media_type=MEDIA_TYPE.decode())

    @api.exception_handler(EmbstoreError)
    def ours(request: Request, error: EmbstoreError) -> Response:
        return reply(problem_of(error, request.scope["request_id"]))

    @api.exception_handler(HTTPException)
    def theirs(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed_request")
        detail = f"{request.method} {request.url.path} is not a call of this server; see /docs"
        answer = reply(problem(code, detail, request.scope["request_id"]))
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        log.error("request failed", path=request.url.path, exc_info=error)
        return reply(problem("internal", "the server failed to answer this request", request.scope["request_id"]))


def _describe(table: Table, release: str | None) -> dict[str, Any]:
    manifest = table.manifest
    assert manifest is not None
    return {
        "table": table.name,
        "version": table.version,
        "release": release,
        "scheme": table.scheme.name,
        "parameters": table.config.parameters(),
        "num_embeddings": table.config.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "id_space": table.ids.kind,
        "num_ids": table.ids.num_ids,
        "num_bytes": table.num_bytes,
        "id_space_bytes": table.ids.num_bytes(),
        "full_bytes": 4 * table.config.num_embeddings * table.embedding_dim,
        "device": table.device,
        "created": manifest.created,
        "metrics": manifest.metrics,
    }


def _versions(tables: Registry, name: str) -> list[dict[str, Any]]:
    loaded, known = tables.snapshot.loaded, tables.status()
    return [
        {
            "version": version,
            "state": status.state,
            "reason": status.reason or None,
            "num_bytes": loaded[key].num_bytes if (key := (name, version)) in loaded else None,
        }
        for (table, version), status in sorted(known.items())
        if table == name
    ]


def _health(reasons: list[str], tables: dict[str, int] | None = None, unserved: list[str] | None = None) -> Response:
    """200 or 503 and why; `unserved` are tables that have a label but no version that can be served."""
    status = "not ready" if reasons else "ok"
    body = {"status": status, "reasons": reasons, "tables": tables or {}, "unserved": unserved or []}
    return _json(body, 503 if reasons else 200)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
