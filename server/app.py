"""The application: parts made from settings, wired once, nothing global."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from embstore import __version__, wire
from embstore.device import device_failure, pick_device
from embstore.errors import EmbstoreError, NotReady
from embstore.parallel import num_cores
from embstore.publish.store import open_store
from embstore.table import Table
from server.api.codecs.open_inference import Inference
from server.api.labels import admin_router
from server.api.lookup import Limits, Street
from server.api.openapi import with_lookups
from server.api.repository import unsupported, v2_router
from server.cache.cached_table import CachedTable
from server.cache.redis_cache import RedisTier, start_embedded
from server.http.admission import Gate
from server.http.asgi import App
from server.http.auth import Keys
from server.http.buffer_pool import Buffers
from server.http.problems import MEDIA_TYPE, STATUS, problem
from server.lookup.batcher import Joiner
from server.lookup.service import LookupService
from server.metrics.recorder import Metrics
from server.settings import EMBEDDED, Settings
from server.tables.health import Health
from server.tables.preloader import Preread
from server.tables.registry import Registry

log = structlog.get_logger()
SWEEP_SECONDS = 1.0


def create_app(
    settings: Settings, preread: Preread | None = None, metrics: Metrics | None = None, control: Path | None = None
) -> App:
    """The server as one ASGI app: lookups in front, FastAPI behind, tables watched from start-up to shutdown.

    metrics: where to count, if several processes count together; control: a folder that these share.
    """
    return _Parts(settings, preread, metrics or Metrics(), control).app


class _Parts:
    """Everything one process serves with, from settings to the app."""

    def __init__(self, settings: Settings, preread: Preread | None, metrics: Metrics, control: Path | None) -> None:
        self.settings, self.metrics = settings, metrics
        device = pick_device(settings.device)
        threads = settings.threads or max(1, num_cores() // settings.workers)
        self.joiner: Joiner | None = None
        if settings.join == "on" or device != "cpu":
            self.joiner = Joiner(wait_s=settings.join_wait_us / 1e6, lookups=metrics.lookups)
        self.service = LookupService(
            inline_ids=settings.inline_ids, num_threads=max(2, threads), joiner=self.joiner, join=settings.join
        )
        self.redis: RedisTier | None = None
        self.tables = Registry(
            open_store(settings.store),
            metrics,
            device=device,
            keep_versions=settings.keep_versions,
            poll_seconds=settings.poll_seconds,
            preread=preread,
            num_threads=threads,
            prepare=self.prepare,
            forget=self.service.forget,
            control=control,
        )
        metrics.watch(self.tables)
        self.health = Health(self.tables, lambda: (self.joiner and self.joiner.problem) or device_failure())
        keys = Keys.read(settings.api_keys_file, settings.admin_keys_file, host=settings.host)
        limits = Limits(
            max_ids=settings.max_ids,
            max_body_bytes=settings.max_body_bytes,
            max_reply_bytes=settings.max_reply_bytes,
            max_connections=settings.max_connections,
            request_seconds=settings.request_seconds,
            keepalive_seconds=settings.keepalive_seconds,
            shutdown_seconds=settings.shutdown_seconds,
        )
        gate = Gate(
            metrics.lookups,
            max_queue=settings.max_queue,
            max_concurrency=settings.max_concurrency,
            max_waiting_bytes=settings.max_waiting_bytes,
        )
        buffers = Buffers()
        inference = Inference(
            self.service, metrics.lookups, buffers, max_ids=limits.max_ids, max_reply_bytes=limits.max_reply_bytes
        )
        street = Street(self.tables, self.service, metrics.lookups, self.health, keys, buffers, limits, inference)
        api = FastAPI(
            title="embstore",
            version=__version__,
            summary="Embedding tables in a fraction of the space.",
            lifespan=self.lifespan,
            redirect_slashes=False,
        )
        api.state.keys = keys
        self.app = App(api, street, gate, buffers, metrics.lookups, limits)
        _add_api(api, self.tables, self.service, metrics)

    def prepare(self, table: Table, before: Table | None) -> None:
        """Make a version ready for its first request, in the thread that loads it."""
        wire.warm()
        self.service.learn(table)
        mode = self.settings.cache
        if mode != "off" and table.ids.num_ids:
            cached = CachedTable(
                table,
                mode=mode,
                tier_bytes=self.settings.cache_bytes,
                redis=self.redis,
                lookups=self.metrics.lookups,
                elsewhere=self.service,
            )
            cached.warm(self.service.cached.get(before) if before is not None else None)
            self.service.cached[table] = cached

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """From start-up to shutdown: Redis, the watcher, the health checks, the sweep of connections."""
        settings = self.settings
        embedded = start_embedded() if settings.redis == EMBEDDED else None
        url = embedded.connection_url if embedded else settings.redis
        if url is not None and settings.cache != "off":
            self.redis = RedisTier(
                url,
                self.metrics.lookups,
                timeout_s=settings.redis_timeout_ms / 1000,
                ttl_seconds=settings.cache_ttl_seconds,
            )
            await self.redis.start()
        self.tables.start()
        self.health.start()
        sweeping = asyncio.create_task(self._sweep())
        yield
        sweeping.cancel()
        self.health.stop()
        self.tables.stop()
        self.service.close()
        if self.redis is not None:
            await self.redis.close()
        if embedded is not None:
            embedded.stop()

    async def _sweep(self) -> None:
        """Look at every connection once a second."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for connection in list(self.app.connections):
                try:
                    connection.sweep(now)
                except Exception:  # one connection's trouble is not the others'
                    log.exception("a connection could not be looked after")
                    connection.transport.abort()


def _add_api(api: FastAPI, tables: Registry, service: LookupService, metrics: Metrics) -> None:
    """Everything that is not a lookup."""
    plain_openapi = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = with_lookups(plain_openapi())
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    _add_errors(api)
    _add_tables(api, tables, service)

    @api.get("/metrics", tags=["operations"], response_class=Response)
    def show_metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    api.include_router(admin_router(tables))
    api.include_router(v2_router(tables))


def _add_tables(api: FastAPI, tables: Registry, service: LookupService) -> None:
    @api.get("/v1/tables", tags=["tables"])
    def list_tables() -> Response:
        """Every table now served, with what serves it."""
        _check_started(tables)
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
        _check_started(tables)
        snapshot = tables.snapshot
        served = snapshot.table(table)
        labels = {label: t.version for (name, label), t in snapshot.labels.items() if name == table}
        about = _describe(served, snapshot.release_of.get((table, served.version)))
        cached = service.cached.get(served)
        cache = cached.describe() if cached else {"mode": "off"}
        return _json(about | {"labels": labels, "cache": cache, "versions": _versions(tables, table)})

    @api.get("/v1/tables/{table}/versions", tags=["tables"])
    def list_versions(table: str) -> Response:
        """State of each version of a table, and why it failed where it did."""
        _check_started(tables)
        versions = _versions(tables, table)
        if not versions:
            tables.snapshot.table(table)  # says which tables there are
        return _json({"table": table, "versions": versions})


def _check_started(tables: Registry) -> None:
    """NotReady before the first look at the store: what is not there yet is not unknown."""
    if not tables.started:
        raise NotReady("tables are still being loaded")


def _add_errors(api: FastAPI) -> None:
    """The same problem bodies as the lookup calls have."""

    def reply(request: Request, code: str, detail: str, facts: dict[str, str | int] | None = None) -> Response:
        on_v2 = request.url.path.startswith("/v2")
        status, body = problem(code, detail, request.scope["request_id"], facts, on_v2=on_v2)
        return Response(body, status, media_type=MEDIA_TYPE.decode())

    @api.exception_handler(EmbstoreError)
    def ours(request: Request, error: EmbstoreError) -> Response:
        if error.code not in STATUS:
            return unexpected(request, error)
        return reply(request, error.code, str(error), error.facts)

    @api.exception_handler(HTTPException)
    def theirs(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed_request")
        path = request.url.path
        if code == "not_found" and path.startswith("/v2"):
            detail = unsupported(path)
        else:
            detail = f"{request.method} {path} is not a call of this server; see /docs"
        answer = reply(request, code, detail)
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        log.error("request failed", path=request.url.path, exc_info=error)
        return reply(request, "internal", "the server failed to answer this request")


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


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
