"""Liveness, start-up and readiness, known beforehand: a thread looks every second, a probe is answered at once.

Started means that the store was looked at once. Ready means that every table served gave the right vectors for its
golden ids a moment ago, through the same code and device as a lookup. A check that does not come back (a device that
hangs) makes the server unready too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import orjson

from embstore.errors import EmbstoreError
from embstore.store.local import LATEST
from embstore.table import check_golden
from server.tables.registry import Registry

CHECK_SECONDS = 1.0
STUCK_SECONDS = 15.0


class Health:
    """What the probes say. `device_problem` tells what is wrong with the device, if anything."""

    def __init__(self, tables: Registry, device_problem: Callable[[], str | None] = lambda: None) -> None:
        self._tables, self._device_problem = tables, device_problem
        self.draining = False
        self._wrong: dict[str, tuple[int, str]] = {}
        self._checked = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="health", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def answer(self, probe: str) -> tuple[int, bytes]:
        """Status and body of `livez`, `startupz` or `readyz`; the last two name the tables served now."""
        if probe == "livez":
            return 200, b'{"status":"ok"}'
        if probe == "startupz":
            reasons = [] if self._tables.started else ["tables are still being loaded"]
        else:
            reasons = self.reasons()
        snapshot = self._tables.snapshot
        versions = {name: table.version for name, table in snapshot.latest.items()}
        return _body(reasons, versions, sorted(snapshot.unserved))

    def reasons(self) -> list[str]:
        """Why traffic is not welcome; empty when it is."""
        tables = self._tables
        reasons = ["shutting down"] if self.draining else []
        if not tables.started:
            return [*reasons, "tables are still being loaded"]
        latest = tables.snapshot.latest
        if not latest:
            reasons.append(tables.problem or f"no table with a label {LATEST!r} could be loaded from the store")
        device = self._device_problem()
        if device is not None:
            reasons.append(device)
        reasons += [why for name, (n, why) in self._wrong.items() if name in latest and latest[name].version == n]
        silent = time.monotonic() - self._checked
        if silent > STUCK_SECONDS:
            reasons.append(f"a lookup of golden ids has not come back for {silent:.0f} seconds")
        return reasons

    def _watch(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            self.check()

    def check(self) -> None:
        """Look up every table's golden ids."""
        wrong = {}
        for name, table in self._tables.snapshot.latest.items():
            try:
                check_golden(table)
            except EmbstoreError as error:
                wrong[name] = (table.version, str(error))
            except Exception as error:  # a device that fails raises what it likes
                wrong[name] = (table.version, f"table {name!r}: {type(error).__name__}: {error}")
        self._wrong = wrong
        self._checked = time.monotonic()


def _body(reasons: list[str], tables: dict[str, int], unserved: list[str]) -> tuple[int, bytes]:
    """200 or 503 and why; `unserved` are tables that have a label but no version that can be served."""
    status = "not ready" if reasons else "ok"
    body = {"status": status, "reasons": reasons, "tables": tables, "unserved": unserved}
    return (503 if reasons else 200), orjson.dumps(body)
