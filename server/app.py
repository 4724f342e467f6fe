"""The application: parts made from settings, wired once, nothing global."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from fastapi import FastAPI
from starlette.types import Lifespan

from embstore import __version__
from embstore.device import device_failure, pick_device
from embstore.kernels.warm import warm
from embstore.parallel import num_cores
from embstore.publish.store import open_store
from embstore.table import Table
from server.api.errors import add_errors
from server.api.labels import labels_router
from server.api.lookup import LookupHandler
from server.api.openapi import document
from server.api.operations import operations_router
from server.api.repository import repository_router
from server.api.shared_memory import Regions
from server.api.system_shared_memory import shared_memory_router
from server.api.tables import tables_router
from server.cache.cached_table import CachedTable
from server.cache.redis_cache import RedisCache, start_embedded
from server.http.admission import Admission
from server.http.asgi import App
from server.http.auth import ApiKeys
from server.http.buffer_pool import Buffers
from server.http.limits import Limits
from server.http.outbox import Outbox
from server.http.services import Services
from server.lookup.batcher import DynamicBatcher
from server.lookup.service import LookupService
from server.metrics.recorder import Metrics
from server.settings import EMBEDDED, Settings
from server.tables.collector import VersionCollector
from server.tables.health import Health
from server.tables.preloader import Preloader
from server.tables.registry import Registry

log = structlog.get_logger()
SWEEP_SECONDS = 1.0


def create_app(
    settings: Settings, preloader: Preloader | None = None, metrics: Metrics | None = None, control: Path | None = None
) -> App:
    """The server as one ASGI app: lookups in front, FastAPI behind, tables watched from start-up to shutdown.

    metrics: where to count, if several processes count together; control: a folder that these share.
    """
    return _Parts(settings, preloader, metrics or Metrics(), control).app


class _Parts:
    """Everything one process serves with, from settings to the app."""

    def __init__(self, settings: Settings, preloader: Preloader | None, metrics: Metrics, control: Path | None) -> None:
        self.settings, self.metrics = settings, metrics
        device = pick_device(settings.device)
        threads = settings.threads or max(1, num_cores() // settings.workers)
        self.batcher: DynamicBatcher | None = None
        if settings.batching == "on" or device != "cpu":
            self.batcher = DynamicBatcher(max_delay_s=settings.batching_max_delay_us / 1e6, lookups=metrics.lookups)
        self.service = LookupService(
            inline_ids=settings.inline_ids,
            num_threads=max(2, threads),
            batcher=self.batcher,
            batching=settings.batching,
        )
        self.redis: RedisCache | None = None
        self.tables = Registry(
            open_store(settings.store),
            metrics,
            device=device,
            keep_versions=settings.keep_versions,
            poll_seconds=settings.poll_seconds,
            preloader=preloader,
            num_threads=threads,
            prepare=self.prepare,
            forget=self.service.forget,
            control=control,
        )
        metrics.registry.register(VersionCollector(self.tables))
        self.health = Health(self.tables, lambda: (self.batcher and self.batcher.problem) or device_failure())
        keys = ApiKeys.read(settings.api_keys_file, settings.admin_keys_file, host=settings.host)
        limits = Limits(
            max_ids=settings.max_ids,
            max_body_bytes=settings.max_body_bytes,
            max_reply_bytes=settings.max_reply_bytes,
            max_connections=settings.max_connections,
            request_seconds=settings.request_seconds,
            keepalive_seconds=settings.keepalive_seconds,
            shutdown_seconds=settings.shutdown_seconds,
        )
        outbox, buffers = Outbox(), Buffers()
        admission = Admission(
            metrics.lookups,
            outbox,
            max_queued_requests=settings.max_queued_requests,
            max_concurrency=settings.max_concurrency,
            max_waiting_bytes=settings.max_waiting_bytes,
        )
        self.regions = Regions(keys, settings.max_shared_memory_bytes, control)
        handler = LookupHandler(
            self.tables, self.service, metrics.lookups, self.health, keys, buffers, limits, self.regions
        )
        services = Services(handler, admission, outbox, buffers, metrics.lookups, limits)
        api = _api(self.tables, self.service, metrics, keys, self.regions, self.lifespan)
        self.app = App(api, services, keys, lambda: self.tables.started)

    def prepare(self, table: Table, before: Table | None) -> None:
        """Make a version ready for its first request, in the thread that loads it."""
        warm()
        self.service.learn(table)
        mode = self.settings.cache
        if mode != "off" and table.ids.num_ids:
            cached = CachedTable(
                table,
                mode=mode,
                tier_bytes=self.settings.cache_bytes,
                redis=self.redis,
                lookups=self.metrics.lookups,
                compute=self.service.compute,
                in_thread=self.service.do,
                inline_ids=self.service.inline_ids,
                inline_misses=self.service.inline_limit(table),
            )
            cached.warm(self.service.cached.get(before) if before is not None else None)
            self.service.attach(table, cached)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """From start-up to shutdown: Redis, the watcher, the health checks, the sweep of connections."""
        settings = self.settings
        embedded = start_embedded() if settings.redis == EMBEDDED else None
        url = embedded.connection_url if embedded else settings.redis
        if url is not None and settings.cache != "off":
            self.redis = RedisCache(
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
        """Look at every connection once a second, and let go of shared memory that is registered no longer."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.regions.sweep()
            now = time.monotonic()
            for connection in list(self.app.services.connections):
                try:
                    connection.sweep(now)
                except Exception:  # one connection's trouble is not the others'
                    log.exception("a connection could not be looked after")
                    connection.transport.abort()


def _api(
    tables: Registry,
    service: LookupService,
    metrics: Metrics,
    keys: ApiKeys,
    regions: Regions,
    lifespan: Lifespan[FastAPI],
) -> FastAPI:
    """Everything that is not a lookup."""
    api = FastAPI(
        title="embstore",
        version=__version__,
        summary="Embedding tables in a fraction of the space.",
        lifespan=lifespan,
        redirect_slashes=False,
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name + ("_version" if "{version}" in route.path else ""),
    )
    api.state.keys = keys
    api.include_router(operations_router(metrics))
    api.include_router(tables_router(tables, service))
    api.include_router(labels_router(tables))
    api.include_router(repository_router(tables))
    api.include_router(shared_memory_router(regions))
    add_errors(api)
    document(api)
    return api
