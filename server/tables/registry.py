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
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path

import structlog

from embstore.errors import EmbstoreError, NotReady, StoreError, TableNotFound
from embstore.publish.store import Store
from embstore.store.labels import Label
from embstore.store.local import LATEST, Release, Survey
from embstore.table import Table
from server.metrics.recorder import Metrics
from server.tables.preloader import Preloader
from server.tables.snapshot import Key, Snapshot, Status, snapshot_of
from server.tables.unloaded import UnloadedTables

log = structlog.get_logger()
LOAD_SECONDS = 60.0


def _nothing(*_: Table | None) -> None:
    """What a registry does with a table unless told otherwise."""


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
        preloader: Preloader | None = None,
        num_threads: int = 1,
        prepare: Callable[[Table, Table | None], None] = _nothing,
        forget: Callable[[Table], None] = _nothing,
        control: Path | None = None,
    ) -> None:
        """control: a folder that processes serving together share, so that what one unloads all of them do."""
        self.store, self.metrics, self.device, self.preloader = store, metrics, device, preloader
        self.keep_versions, self.poll_seconds = keep_versions, poll_seconds
        self.num_threads, self._prepare, self._forget = num_threads, prepare, forget
        self.snapshot = Snapshot()
        self.started = False
        self.problem: str | None = None
        self._status: dict[Key, Status] = {}
        self._reported: set[str] = set()
        self._seen: Survey | None = None
        """What the latest look found."""
        self.unloaded = UnloadedTables(control)
        """Tables that were unloaded."""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._looks = threading.Condition()
        self._looks_begun = self._looks_done = 0
        self._thread = threading.Thread(target=self._watch, name="tables", daemon=True)

    def start(self) -> None:
        """Begin to watch; returns at once, `started` becomes true when the first look is done."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; what is loaded stays."""
        self._stop.set()
        self._wake.set()
        with self._looks:
            self._looks.notify_all()

    def unload(self, name: str, seconds: float = LOAD_SECONDS) -> None:
        """Stop serving a table until it is loaded again. Other processes follow at their next look at the store."""
        self.check_known(name)
        self.unloaded.add(name)
        self.look(seconds)
        if self._serves(name):
            raise NotReady(f"table {name!r} is still being taken out of service", table=name)

    def load(self, name: str, seconds: float = LOAD_SECONDS) -> None:
        """Look at the store now and serve a table as it stands there; NotReady says why it cannot be served."""
        self.check_known(name)
        self.unloaded.discard(name)
        for key, status in self.status().items():
            if key[0] == name and status.state == "failed":  # the file may have been mended
                self._status.pop(key, None)
        looked = self.look(seconds)
        if looked and not self.problem and self._serves(name) and name not in self.snapshot.unserved:
            return
        reasons = [f"version {n}: {s.reason}" for (t, n), s in sorted(self.status().items()) if t == name and s.reason]
        if self.problem:
            reasons.append(self.problem)
        elif not looked:
            reasons.append("it is still being loaded")
        raise NotReady(f"table {name!r} is not served: {'; '.join(reasons) or 'no label points at it'}", table=name)

    def look(self, seconds: float) -> bool:
        """Look at the store now; whether a look that began after this call ended within so many seconds."""
        with self._looks:
            wanted = self._looks_begun + 1
            self._wake.set()
            return self._looks.wait_for(lambda: self._looks_done >= wanted or self._stop.is_set(), seconds)

    def check_known(self, name: str) -> None:
        """TableNotFound when a table is neither served nor in the store."""
        if not self._serves(name) and name not in self.store.tables():
            raise TableNotFound(name)

    def _serves(self, name: str) -> bool:
        return any(served == name for served, _ in self.snapshot.loaded)

    def status(self) -> dict[Key, Status]:
        """State of every version the registry knows of."""
        return dict(self._status)

    def _watch(self) -> None:
        while True:
            self._wake.clear()
            with self._looks:
                self._looks_begun += 1
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
            with self._looks:
                self._looks_done = self._looks_begun
                self._looks.notify_all()
            self._wake.wait(self.poll_seconds)
            if self._stop.is_set():
                return

    def refresh(self) -> None:
        """One look at the store: load what is new, swap if anything that is served changed."""
        before, survey = self.snapshot, self.store.survey()
        if before.loaded and not survey.versions:
            raise StoreError(f"store {self.store.root} is empty; keeping the loaded tables")
        self._report(survey.damaged)
        seen, self._seen = self._seen, survey
        survey = _without(_with_vanished(survey, seen), self.unloaded.read())
        loaded = dict(before.loaded)
        served = {key: self._serve(key, at, survey.releases, loaded, before) for key, at in survey.labels.items()}
        served |= {key: before.labels.get(key) for key in survey.unread}
        spare: list[Key] = []
        if before.latest:  # what is asked for first comes first: the spare versions wait for the second look
            spare = [(name, n) for name, versions in survey.versions.items() for n in versions[-self.keep_versions :]]
            for key in spare:
                self._obtain(key, loaded)
        kept = {(table.name, table.version) for table in served.values() if table} | set(spare)
        after = snapshot_of(
            {key: table for key, table in served.items() if table},
            {key: table for key, table in loaded.items() if key in kept},
            survey.releases,
            {name for (name, label), table in served.items() if label == LATEST and table is None},
        )
        if after != before:
            self._swap(before, after)
        for key, table in loaded.items():  # the healthy half of a release that cannot be served
            if key not in after.loaded and key not in before.loaded:
                self._status.pop(key, None)
                self._forget(table)

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
            needed = {(name, position.version), *(release.tables.items() if release else ())}
            hopeless = any((known := self._status.get(other)) is not None and known.final for other in needed)
            if not hopeless and all([self._obtain(other, loaded) for other in needed]):
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
            stored = self.preloader.take(name, version) if self.preloader else None
            stored = stored or self.store.read_version(name, version)
            table = self.store.verified_table(stored, device=self.device, num_threads=self.num_threads)
            try:
                self._prepare(table, self.snapshot.latest.get(name))
            except BaseException:
                self._forget(table)
                raise
        except Exception as error:
            self._refuse(key, error)
            return False
        seconds = time.perf_counter() - begin
        self._status[key] = Status("ready")
        self.metrics.loads["ok"].inc()
        self.metrics.load_seconds.observe(seconds)
        self.metrics.lookups.add_table(name)
        loaded[key] = table
        log.info("version loaded", table=name, version=version, seconds=round(seconds, 3))
        return True

    def _refuse(self, key: Key, error: Exception) -> None:
        """Keep why a version cannot be served; a disk that fails is asked again at the next look."""
        status = Status("failed", str(error) or type(error).__name__, final=not isinstance(error, StoreError))
        if self._status.get(key) != status:
            self.metrics.loads["failed"].inc()
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
            self._forget(before.loaded[key])
        moved = {n: t.version for n, t in after.latest.items() if before.latest.get(n) is not t}
        if moved:
            self.metrics.swaps.inc()
            log.info("serving", **moved)
        gc.collect()
        gc.freeze()  # tables live long: nobody walks them again, and walking all there is would stop requests for 0.1 s


def _with_vanished(survey: Survey, before: Survey | None) -> Survey:
    """A survey and what only the look before it found: a store that is being deleted, or replaced, loses it all soon.

    What two looks in a row do not find is gone.
    """
    if before is None:
        return survey
    return replace(
        survey,
        versions={
            name: sorted({*before.versions.get(name, ()), *survey.versions.get(name, ())})
            for name in before.versions | survey.versions
        },
        labels={key: label for key, label in before.labels.items() if key not in survey.unread} | survey.labels,
        releases=before.releases | survey.releases,
    )


def _without(survey: Survey, unloaded: Set[str]) -> Survey:
    """A survey as if these tables were not in the store; a release is what is left of it."""
    if not unloaded:
        return survey
    releases = {
        key: replace(release, tables={name: n for name, n in release.tables.items() if name not in unloaded})
        for key, release in survey.releases.items()
    }
    return replace(
        survey,
        versions={name: versions for name, versions in survey.versions.items() if name not in unloaded},
        labels={key: label for key, label in survey.labels.items() if key[0] not in unloaded},
        releases={key: release for key, release in releases.items() if release.tables},
        unread={key for key in survey.unread if key[0] not in unloaded},
    )
