"""The tables a server serves: looks at the store, loads new versions beside the old, swaps in one assignment.

A request reads `registry.snapshot` once and works on that; nothing in a snapshot ever changes. The watching thread
builds the next snapshot and assigns it, so a swap drops nothing and no request sees half of one.

Which version a label means is the store's to say, the same in every process (a release's labels move together). A
version that cannot be verified is never served, nor the rest of its release; what was served before goes on.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from importlib import import_module

import structlog

from embstore.errors import (
    EmbstoreError,
    LabelNotFound,
    NotReady,
    ReleaseNotFound,
    StoreError,
    TableNotFound,
    VersionNotFound,
)
from embstore.labels import Label
from embstore.publish import Store
from embstore.store import LATEST, Release
from embstore.table import Table
from server.metrics import Metrics
from server.preread import Preread

log = structlog.get_logger()
Key = tuple[str, int]


@dataclass(frozen=True)
class Status:
    """What became of a version: loading, ready or failed, why, and whether that is the last word."""

    state: str
    reason: str = ""
    final: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What is served at one moment."""

    latest: Mapping[str, Table] = field(default_factory=dict)
    labels: Mapping[tuple[str, str], Table] = field(default_factory=dict)
    loaded: Mapping[Key, Table] = field(default_factory=dict)
    releases: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    release_of: Mapping[Key, str] = field(default_factory=dict)
    unserved: Set[str] = frozenset()

    def table(self, name: str, *, version: int | None = None, label: str | None = None) -> Table:
        """A table by version, by label, or the latest; NotFound errors say what there is."""
        if version is None and label is None:
            found = self.latest.get(name)
        elif label is not None:
            found = self.labels.get((name, label))
        else:
            found = self.loaded.get((name, version or 0))
        if found is not None:
            return found
        if name in self.unserved and version is None and label in (None, LATEST):
            raise NotReady(f"no version of table {name!r} can be served", table=name)
        versions = sorted(v for n, v in self.loaded if n == name)
        if not versions:
            raise TableNotFound(name, "is being served")
        if version is not None:
            raise VersionNotFound(name, version, f" loaded; loaded are {', '.join(map(str, versions))}")
        labels = sorted(known for n, known in self.labels if n == name)
        raise LabelNotFound(name, LATEST if label is None else label, f"; it has {', '.join(labels) or 'none'}")

    def together(self, names: list[str], release: str | None) -> tuple[str | None, dict[str, Table]]:
        """Tables of one release, with its id: the one asked for, or the one now serving all of them.

        The id is None where the tables now serving were not published together.
        """
        if release is not None:
            tables = self.releases.get(release)
            if tables is None:
                raise ReleaseNotFound(release, f"; loaded are {', '.join(self.releases) or 'none'}")
            for name in names:
                if name not in tables:
                    raise TableNotFound(name, f"in release {release!r}")
            return release, {name: tables[name] for name in names}
        chosen = {name: self.table(name) for name in names}
        ids = {self.release_of.get((table.name, table.version)) for table in chosen.values()}
        return (ids.pop() if len(ids) == 1 else None), chosen


class Registry:
    """Keeps `snapshot` in step with a store, from a thread of its own."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        device: str,
        keep_versions: int,
        poll_seconds: float,
        preread: Preread | None = None,
    ) -> None:
        self.store, self.metrics, self.device, self.preread = store, metrics, device, preread
        self.keep_versions, self.poll_seconds = keep_versions, poll_seconds
        self.snapshot = Snapshot()
        self.started = False
        self.problem: str | None = None
        self._status: dict[Key, Status] = {}
        self._reported: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tables", daemon=True)

    def start(self) -> None:
        """Begin to watch; returns at once, `started` becomes true when the first look is done."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; what is loaded stays."""
        self._stop.set()

    def status(self) -> dict[Key, Status]:
        """State of every version the registry knows of."""
        return dict(self._status)

    def _watch(self) -> None:
        import_module("embstore.kernels.numba_pooling")  # compiled before readiness, not in the first pooled request
        while True:
            try:
                self.refresh()
                self.problem = None
            except EmbstoreError as error:
                if str(error) != self.problem:
                    log.error("store cannot be read; serving what is loaded", error=str(error))
                self.problem = str(error)
            except Exception:
                self.problem = "the store could not be read"
                log.exception("looking at the store failed; serving what is loaded")
            self.started = True
            if self._stop.wait(self.poll_seconds):
                return

    def refresh(self) -> None:
        """One look at the store: load what is new, swap if anything that is served changed."""
        before, survey = self.snapshot, self.store.survey()
        if before.loaded and not survey.versions:
            raise StoreError(f"{self.store.root} has no tables any more")
        self._report(survey.damaged)
        loaded = dict(before.loaded)
        served = {key: self._serve(key, at, survey.releases, loaded, before) for key, at in survey.labels.items()}
        served |= {key: before.labels.get(key) for key in survey.unread}
        spare: list[Key] = []
        if before.latest:  # what is asked for first comes first: the spare versions wait for the second look
            spare = [(name, n) for name, versions in survey.versions.items() for n in versions[-self.keep_versions :]]
            for key in spare:
                self._obtain(key, loaded)
        kept = {(table.name, table.version) for table in served.values() if table} | set(spare)
        after = _snapshot(
            {key: table for key, table in served.items() if table},
            {key: table for key, table in loaded.items() if key in kept},
            survey.releases,
            {name for (name, label), table in served.items() if label == LATEST and table is None},
        )
        if after != before:
            self._swap(before, after)

    def _serve(
        self,
        key: tuple[str, str],
        at: Label,
        releases: Mapping[str, Release],
        loaded: dict[Key, Table],
        before: Snapshot,
    ) -> Table | None:
        """The table to serve for a label: its target, or the last position before it that can be served whole."""
        name, label = key
        position: Label | None = at
        while position is not None:
            release = releases.get(position.release or "")
            needed = set(release.tables.items()) if release else set()
            if all([self._obtain(other, loaded) for other in needed | {(name, position.version)}]):
                table = loaded[name, position.version]
                if position is not at and before.labels.get(key) is not table:
                    log.error(
                        "serving an older version", table=name, label=label, wanted=at.version, version=table.version
                    )
                return table
            position = position.back()
        return before.labels.get(key)

    def _obtain(self, key: Key, loaded: dict[Key, Table]) -> bool:
        """Whether this version is loaded, after trying; one that failed verification is not tried again."""
        if key in loaded:
            return True
        known = self._status.get(key)
        if known and known.final:
            return False
        name, version = key
        self._status[key] = known or Status("loading")
        begin = time.perf_counter()
        try:
            stored = self.preread.take(name, version) if self.preread else None
            stored = stored or self.store.read_version(name, version)
            table = self.store.verified_table(stored, device=self.device)
        except Exception as error:
            self._refuse(key, error)
            return False
        seconds = time.perf_counter() - begin
        self._status[key] = Status("ready")
        self.metrics.loads.labels("ok").inc()
        self.metrics.load_seconds.observe(seconds)
        self.metrics.lookups.add_table(name)
        loaded[key] = table
        log.info("version loaded", table=name, version=version, seconds=round(seconds, 3))
        return True

    def _refuse(self, key: Key, error: Exception) -> None:
        """Keep why a version cannot be served; a disk that fails is asked again at the next look."""
        status = Status("failed", str(error) or type(error).__name__, final=not isinstance(error, StoreError))
        if self._status.get(key) != status:
            self.metrics.loads.labels("failed").inc()
            unexpected = None if isinstance(error, EmbstoreError) else error
            log.error("version refused", table=key[0], version=key[1], error=status.reason, exc_info=unexpected)
        self._status[key] = status

    def _report(self, damaged: list[str]) -> None:
        """Log each damaged file of the store once."""
        for line in damaged:
            if line not in self._reported:
                log.error("damaged file in the store", error=line)
        self._reported = set(damaged)

    def _swap(self, before: Snapshot, after: Snapshot) -> None:
        self.snapshot = after
        for key in set(before.loaded) - set(after.loaded):
            self._status.pop(key, None)
        moved = {n: t.version for n, t in after.latest.items() if before.latest.get(n) is not t}
        if moved:
            self.metrics.swaps.inc()
            log.info("serving", **moved)
        gc.collect()
        gc.freeze()  # tables live long: keep the collector from walking them on the request path


def _snapshot(
    labels: dict[tuple[str, str], Table], loaded: dict[Key, Table], releases: Mapping[str, Release], unserved: Set[str]
) -> Snapshot:
    complete = {
        release.id: {name: loaded[name, version] for name, version in release.tables.items()}
        for release in releases.values()
        if all(key in loaded for key in release.tables.items())
    }
    latest = {name: table for (name, label), table in labels.items() if label == LATEST}
    release_of = {
        (name, table.version): release_id
        for release_id, tables in complete.items()  # ascending: the newest release of a version wins
        for name, table in tables.items()
    }
    return Snapshot(latest, labels, loaded, complete, release_of, unserved)
