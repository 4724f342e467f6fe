"""Where a generator process takes its requests from: made ahead as far as that goes, so that sending never waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Ask, Scenario
from loadtest.workload.batch_sizes import Batches, largest
from loadtest.workload.ids import KeyStream, ReplayKeys, key_stream
from loadtest.workload.requests import Prepared, prepare
from loadtest.workload.schedule import expected

MAX_REQUESTS = 20_000
MAX_BYTES = 64 << 20
"""A process makes so much ahead at most, then sends it again."""
OVERHEAD = 400
"""Bytes of a request beside its body, about."""
IDS_AT_ONCE = 1 << 17
CHOICES = 4096


class Source:
    """The requests of one generator process, share `share` of `shares`; `scenario` is the whole one, seed unchanged.

    What depends on when it is asked (a hot set that drifts), or must come in order (a recording), is made when it is
    asked for; everything else is made here, ahead.

    notes: what people should know about the ids, one line each.
    """

    def __init__(self, scenario: Scenario, share: int, shares: int, num_ids_by_table: Mapping[str, int]) -> None:
        asks = [ask for ask in scenario.asks if ask.weight > 0]
        weights = np.array([ask.weight for ask in asks])
        self._shares = weights / weights.sum()
        self._rng = np.random.default_rng([scenario.seed, share, 0xA5C])
        self._choices: list[int] = []
        self._streams = [
            _Stream(ask, at, scenario.seed, share, shares, num_ids_by_table) for at, ask in enumerate(asks)
        ]
        total = expected(scenario)
        for stream, part in zip(self._streams, self._shares, strict=True):
            mean = math.inf if total is None else total / shares * part
            stream.make_ahead(mean + 5 * math.sqrt(mean) + 1, MAX_REQUESTS * part, MAX_BYTES / len(asks))
        self.notes = list(dict.fromkeys(note for stream in self._streams for note in stream.notes))

    def next(self, second: float) -> Prepared:
        """The next request, sent `second` seconds after the measurement began (negative: in the warm-up)."""
        if len(self._streams) == 1:
            return self._streams[0].next(second)
        if not self._choices:
            self._choices = self._rng.choice(len(self._streams), CHOICES, p=self._shares).tolist()
        return self._streams[self._choices.pop()].next(second)

    @property
    def cycled(self) -> bool:
        """Whether requests made ahead have run out and come again, or a recording has."""
        return any(stream.cycled for stream in self._streams)


class _Stream:
    """Requests of one kind."""

    def __init__(
        self, ask: Ask, at: int, seed: int, share: int, shares: int, num_ids_by_table: Mapping[str, int]
    ) -> None:
        self.ask = ask
        replay = ask.keys.kind == "replay"
        self.live = replay or (ask.keys.kind == "hot" and ask.keys.drift > 0)
        # shares of a recording have sizes in common: see ReplayKeys
        self.sizes = Batches(ask.batch, [seed, 0 if replay else share, at, 0xBA7])
        self.keys: list[KeyStream] = []
        for place, table in enumerate(ask.tables):
            num_ids = ask.keys.num_ids or num_ids_by_table.get(table, 0)
            if not num_ids and not ask.keys.file:
                raise ScenarioError(f"asks: ids of table {table!r} are no range: set keys.num_ids, or keys.file")
            self.keys.append(key_stream(ask.keys, num_ids, seed, share, shares, salt=1000 * at + place))
        self.replays = [keys for keys in self.keys if isinstance(keys, ReplayKeys)]
        self.notes = [keys.note for keys in self.replays if keys.note]
        self.made: list[Prepared] = []
        self.next_at = 0
        self.begun_again = False

    def make_ahead(self, needed: float, max_requests: float, max_bytes: float) -> None:
        """As many as are needed, within the limits but one at least; none of what is made when it is asked for."""
        if self.live:
            return
        wanted, num_bytes = max(1, math.ceil(min(needed, max_requests))), 0.0
        while len(self.made) < wanted and num_bytes < max_bytes:
            for request in self._block(wanted - len(self.made)):
                num_bytes += len(request.body) + OVERHEAD
                self.made.append(request)
                if num_bytes >= max_bytes:
                    break

    def next(self, second: float) -> Prepared:
        if self.live:
            sizes = self.sizes.draw(len(self.keys)).tolist()
            return prepare(self.ask, [keys.draw(n, second) for keys, n in zip(self.keys, sizes, strict=True)])
        if self.next_at == len(self.made):
            self.next_at, self.begun_again = 0, True
        request = self.made[self.next_at]
        self.next_at += 1
        return request

    @property
    def cycled(self) -> bool:
        return self.begun_again or any(keys.cycled for keys in self.replays)

    def _block(self, most: int) -> list[Prepared]:
        """Some requests at once: to draw their ids one by one would take longer."""
        num = max(1, min(most, IDS_AT_ONCE // (len(self.keys) * largest(self.ask.batch))))
        sizes_TR = self.sizes.draw(num * len(self.keys)).reshape(len(self.keys), num)
        ids = [_cut(keys.draw(int(sizes.sum()), 0.0), sizes) for keys, sizes in zip(self.keys, sizes_TR, strict=True)]
        return [prepare(self.ask, parts) for parts in zip(*ids, strict=True)]


def _cut(ids: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    ends = [0, *np.cumsum(sizes).tolist()]
    return [ids[begin:end] for begin, end in pairwise(ends)]
