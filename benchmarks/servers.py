"""A store of random tables and the servers over it that HTTP benchmarks compare, each started when first asked for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.load import Target, requests_per_s
from benchmarks.processes import Server, cores, serving

TABLES = ("full", "full_int8", "qr", "memcom", "dhe")
RATIO = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the tables; `dim` is even."""

    num_ids: int = 2_000_000
    dim: int = 64
    dhe_ids: int = 200_000
    dhe_bytes: int = 1_000_000


def publish(folder: Path, sizes: Sizes, tables: Sequence[str] = TABLES) -> None:
    """`full` in float32 and int8, qr and memcom a sixteenth of it, dhe a network; of full and dhe two versions."""
    import embstore
    from embstore.schemes import DHE, QR, Full, MEmCom
    from embstore.schemes.base import Scheme

    store, budget = embstore.open_store(folder), 4 * sizes.num_ids * sizes.dim // RATIO
    full = Full(sizes.num_ids, sizes.dim)
    makers: dict[str, Callable[[], Scheme]] = {
        "full": lambda: full,
        "full_int8": lambda: full,
        "qr": lambda: QR.from_budget(sizes.num_ids, sizes.dim, budget),
        "memcom": lambda: MEmCom.from_budget(sizes.num_ids, sizes.dim, budget),
        "dhe": lambda: DHE.from_budget(sizes.dhe_ids, sizes.dim, sizes.dhe_bytes),
    }
    for name in tables:
        module = makers[name]()
        for _ in range(2 if name in ("full", "dhe") else 1):
            store.publish(name, module, dtype="int8" if name == "full_int8" else "float32")


class Servers:
    """Servers on the first core, ended with `stack`; `seconds` and `rounds` are those of a measurement."""

    def __init__(self, folder: Path, sizes: Sizes, seconds: float, rounds: int, stack: ExitStack) -> None:
        self.folder, self.store, self.sizes, self.stack = folder, folder / "store", sizes, stack
        self.seconds, self.rounds, self.cores = seconds, rounds, cores()
        self.num_started = 0
        self.base = cache(lambda: stack.enter_context(self.started("--cache", "off")))
        """The server of most rows: cache off, one worker."""
        self._limit = cache(lambda: stack.enter_context(self._start(("benchmarks.limit", str(sizes.dim)))))
        self.saturation = cache(self._saturation)
        """Requests of 1,000 ids a second that `base` answers at most."""

    def started(self, *flags: str, on: list[int] | None = None) -> AbstractContextManager[Server]:
        """A server with these flags."""
        fixed = ("--store", str(self.store), "--port", "0", "--device", "cpu", "--drain-seconds", "0")
        return self._start(("embstore", "serve", *fixed, *flags), on)

    def _start(self, command: tuple[str, ...], on: list[int] | None = None) -> AbstractContextManager[Server]:
        self.num_started += 1
        return serving(command, self.folder / f"log-{self.num_started}", self.cores[:1] if on is None else on)

    def target(self, table: str, batch: int, *, server: Server | None = None, **options: Any) -> Target:
        """Lookups of a table; `options` are fields of Target. Called after its table, or protocol if not octets."""
        num_ids = self.sizes.dhe_ids if table == "dhe" else self.sizes.num_ids
        name = options.pop("name", options.get("protocol", table))
        return Target(name=name, url=(server or self.base()).url, table=table, num_ids=num_ids, batch=batch, **options)

    def limit(self, batch: int) -> Target:
        """The app that looks nothing up, sending what a lookup of so many ids sends."""
        return replace(self.target("full", batch, name="limit"), url=self._limit().url)

    def _saturation(self) -> float:
        target = self.target("full", 1_000)
        return statistics.median(requests_per_s(target, self.seconds) for _ in range(min(3, self.rounds)))
