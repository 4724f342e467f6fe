"""The service: one ranking is one lookup, one pass of the model, one answer; and the probes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ranker.artifact import Artifact, Key
from ranker.metrics import Metrics
from ranker.model import rank
from ranker.problems import LimitBody, TooLarge, add_handlers
from ranker.remote import ALL_REASONS, Remote, Vectors
from ranker.schemas import Ranked, RankRequest, RankResponse, key_of
from ranker.settings import Settings


class Ranker:
    """Answers rankings by one artifact."""

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self.artifact, self.max_candidates = artifact, settings.max_candidates
        self.remote = Remote(artifact, settings)
        self.metrics = Metrics(artifact.release, ALL_REASONS)
        self.metrics.served.set_function(lambda: self.remote.problem is None)

    async def rank(self, request: RankRequest) -> RankResponse:
        """The best candidates, whatever state the embedding service is in."""
        if len(request.candidates) > self.max_candidates:
            asked = f"{len(request.candidates):,} candidates, but a request may have {self.max_candidates:,}"
            raise TooLarge(asked, self.max_candidates)
        user = key_of(request.user, self.artifact.user, "user")
        keyed: dict[Key, int | str] = {}
        for place, value in enumerate(request.candidates):
            keyed.setdefault(key_of(value, self.artifact.item, f"candidates[{place}]"), value)
        items = list(keyed)
        began = time.perf_counter()
        vectors = await self.remote.vectors(user, items)
        fetched = time.perf_counter()
        order, scores = rank(self.artifact.scorer, vectors.user_D, vectors.items_CD, request.top)
        self._count(vectors, len(items), fetched - began, time.perf_counter() - fetched)
        return RankResponse(
            release=self.artifact.release,
            items=[Ranked(id=keyed[items[place]], score=score) for place, score in zip(order, scores, strict=True)],
            degraded=vectors.degraded is not None,
            reason=vectors.degraded,
            unknown_user=vectors.unknown_user,
            num_unknown_items=vectors.num_unknown_items,
        )

    def _count(self, vectors: Vectors, num_items: int, fetch_seconds: float, score_seconds: float) -> None:
        metrics = self.metrics
        metrics.fetch.observe(fetch_seconds)
        metrics.score.observe(score_seconds)
        metrics.rankings.labels("no" if vectors.degraded is None else "yes").inc()
        if vectors.degraded is not None:
            metrics.degraded.labels(vectors.degraded).inc()
            return
        for side, asked, unknown in (
            ("user", 1, int(vectors.unknown_user)),
            ("item", num_items, vectors.num_unknown_items),
        ):
            metrics.ids.labels(side, "no").inc(unknown)
            metrics.ids.labels(side, "yes").inc(asked - unknown)


def create_app(artifact: Artifact, settings: Settings) -> FastAPI:
    """The application; it looks after its release for as long as it runs."""
    ranker = Ranker(artifact, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(ranker.remote.watch())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await ranker.remote.close()

    app = FastAPI(title="Ranker", description="Ranks candidates by vectors from embstore.", lifespan=lifespan)
    app.add_middleware(LimitBody, limit=settings.max_body_bytes)
    add_handlers(app, ranker.metrics.refused)

    @app.post("/rank")
    async def best(request: RankRequest) -> RankResponse:
        """The best candidates for a user."""
        return await ranker.rank(request)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether the release that this ranker is pinned to was seen, with the vectors of training."""
        problem = ranker.remote.problem
        body = {
            "status": "not ready" if problem else "ok",
            "reasons": [problem] if problem else [],
            "release": artifact.release,
        }
        return JSONResponse(body, 503 if problem else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(ranker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
