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
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from embstore.errors import EmbstoreError, LabelNotFound, ReleaseNotFound, TableNotFound, VersionNotFound
from embstore.publish import Store
from embstore.store import LATEST, Label, Release
from embstore.table import Table
from server.metrics import Metrics
from server.preread import Preread

log = structlog.get_logger()
Key = tuple[str, int]


@dataclass(frozen=True)
class Status:
    """What became of a version: loading, ready or failed, and why."""

    state: str
    reason: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What is served at one moment."""

    latest: Mapping[str, Table] = field(default_factory=dict)
    labels: Mapping[tuple[str, str], Table] = field(default_factory=dict)
    loaded: Mapping[Key, Table] = field(default_factory=dict)
    releases: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    release_of: Mapping[Key, str] = field(default_factory=dict)

    def table(self, name: str, *, version: int | None = None, label: str | None = None) -> Table:
        """A table by version, by label, or the latest; NotFound errors say what there is."""
        if version is None and label is None:
            found = self.latest.get(name)
        elif version is not None:
            found = self.loaded.get((name, version))
        else:
            found = self.labels.get((name, label or LATEST))
        if found is not None:
            return found
        versions = sorted(v for n, v in self.loaded if n == name)
        if not versions:
            raise TableNotFound(name, "is being served")
        if version is not None:
            raise VersionNotFound(name, version, f" loaded; loaded are {', '.join(map(str, versions))}")
        labels = sorted(known for n, known in self.labels if n == name)
        raise LabelNotFound(name, label or LATEST, f"; it has {', '.join(labels) or 'none'}")

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
        before = self.snapshot
        names = self.store.tables()
        targets = {(name, label): at for name in names for label, at in self.store.labels(name).items()}
        releases = {release.id: release for release in self.store.releases()}
        newest = {name: self.store.versions(name)[-self.keep_versions :] for name in names}
        wanted = [(name, at.version) for (name, _), at in targets.items()]
        loaded = self._load(wanted, dict(before.loaded))
        if not before.latest:  # nothing to fall back on yet: go live first, load the spare versions on the next look
            spare = [(n, v) for (n, v) in wanted if (n, v) not in loaded for v in newest[n]]
        else:
            spare = [(name, version) for name in names for version in newest[name]]
        loaded = self._load(spare, loaded)
        served = {key: self._serve(key, at, releases, loaded, before) for key, at in targets.items()}
        kept = {(t.name, t.version) for t in served.values() if t} | set(wanted) | set(spare)
        after = _snapshot(
            {key: table for key, table in served.items() if table},
            {key: table for key, table in loaded.items() if key in kept},
            releases,
        )
        if (after.labels, after.loaded, after.releases) != (before.labels, before.loaded, before.releases):
            self._swap(before, after)

    def _load(self, keys: list[Key], loaded: dict[Key, Table]) -> dict[Key, Table]:
        """`loaded` and those of `keys` that can be; a version that failed verification is not tried again."""
        for key in dict.fromkeys(keys):
            if key in loaded or self._status.get(key, Status("")).state == "failed":
                continue
            name, version = key
            self._status[key] = Status("loading")
            begin = time.perf_counter()
            try:
                stored = self.preread.take(name, version) if self.preread else None
                stored = stored or self.store.read_version(name, version)
                loaded[key] = self.store.verified_table(stored, device=self.device)
            except EmbstoreError as error:
                self._status[key] = Status("failed", str(error))
                self.metrics.loads.labels("failed").inc()
                log.error("version refused", table=name, version=version, error=str(error))
                continue
            seconds = time.perf_counter() - begin
            self._status[key] = Status("ready")
            self.metrics.loads.labels("ok").inc()
            self.metrics.load_seconds.observe(seconds)
            self.metrics.lookups.add_table(name)
            log.info("version loaded", table=name, version=version, seconds=round(seconds, 3))
        return loaded

    def _serve(
        self,
        key: tuple[str, str],
        at: Label,
        releases: Mapping[str, Release],
        loaded: Mapping[Key, Table],
        before: Snapshot,
    ) -> Table | None:
        """The table to serve for a label: its target if all of the target's release is loaded, else the last good."""
        name, label = key
        release = releases.get(at.release or "")
        needed = release.tables.items() if release else [(name, at.version)]
        if all(version_key in loaded for version_key in needed) and (name, at.version) in loaded:
            return loaded[name, at.version]
        if key in before.labels:
            return before.labels[key]
        older = [v for n, v in loaded if n == name and v < at.version]
        if older:
            log.error("serving an older version", table=name, label=label, wanted=at.version, version=max(older))
            return loaded[name, max(older)]
        return None

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
    labels: dict[tuple[str, str], Table], loaded: dict[Key, Table], releases: Mapping[str, Release]
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
    return Snapshot(latest, labels, loaded, complete, release_of)
