"""What /metrics shows. Every series is there from the start, so that a rate has a zero to begin from."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """The counters of one service."""

    def __init__(self, release: str, reasons: tuple[str, ...]) -> None:
        self.registry = CollectorRegistry()
        self.rankings = Counter("ranker_rankings_total", "Rankings answered.", ["degraded"], registry=self.registry)
        self.degraded = Counter(
            "ranker_degraded_total", "Rankings by default vectors, and why.", ["reason"], registry=self.registry
        )
        self.ids = Counter("ranker_ids_total", "Ids ranked by.", ["side", "known"], registry=self.registry)
        self.refused = Counter("ranker_refused_total", "Requests refused as wrong.", registry=self.registry)
        self.seconds = Histogram(
            "ranker_stage_duration_seconds", "Time of a stage.", ["stage"], buckets=SECONDS, registry=self.registry
        )
        self.served = Gauge(
            "ranker_release_served", "Whether the pinned release is served.", ["release"], registry=self.registry
        ).labels(release)
        for degraded in ("no", "yes"):
            self.rankings.labels(degraded)
        for reason in reasons:
            self.degraded.labels(reason)
        for side in ("user", "item"):
            for known in ("no", "yes"):
                self.ids.labels(side, known)
        self.fetch, self.score = self.seconds.labels("fetch"), self.seconds.labels("score")
