"""Gauges of versions, read from the registry of tables when they are scraped: nothing to keep in step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from typing import get_args

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.metrics.families import scraped
from server.tables.registry import Registry
from server.tables.snapshot import State


class VersionCollector(Collector):
    """What this process serves and has loaded."""

    def __init__(self, tables: Registry) -> None:
        self.tables = tables

    def collect(self) -> Iterable[Metric]:
        info, state = scraped("embstore_version_info"), scraped("embstore_version_state")
        age, size = scraped("embstore_version_age_seconds"), scraped("embstore_table_bytes")
        snapshot = self.tables.snapshot
        for table in snapshot.latest.values():
            assert table.manifest is not None
            info.add_metric([table.name, str(table.version), table.scheme.name], 1)
            created = datetime.fromisoformat(table.manifest.created).timestamp()
            age.add_metric([table.name], max(0.0, time.time() - created))
        for table in snapshot.loaded.values():
            size.add_metric([table.name, str(table.version), table.device], table.num_bytes)
        for (name, version), status in self.tables.status().items():
            for known in get_args(State):
                state.add_metric([name, str(version), known], float(status.state == known))
        yield from (info, state, age, size)
