"""Where a generator process takes its requests from: made ahead as far as that goes, so that sending never waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import RequestSpec, Scenario
from loadtest.workload.batch_sizes import Batches, largest
from loadtest.workload.ids import IdStream, ReplayIds, id_stream
from loadtest.workload.requests import PreparedRequest, prepare
from loadtest.workload.schedule import expected

MAX_REQUESTS = 20_000
MAX_BYTES = 64 << 20
"""A process makes so much ahead at most, then sends it again."""
OVERHEAD = 400
"""Bytes of a request beside its body, about."""
IDS_AT_ONCE = 1 << 17
CHOICES = 4096


class RequestStream:
    """The requests of one generator process, share `share` of `shares`; `scenario` is the whole one, seed unchanged.

    What depends on when it is sent (a hot set that drifts), or must come in order (a recording), is made on
    demand; everything else is made here, ahead.

    notes: what people should know about the ids, one line each.
    """

    def __init__(self, scenario: Scenario, share: int, shares: int, num_ids_by_table: Mapping[str, int]) -> None:
        requests = [spec for spec in scenario.requests if spec.weight > 0]
        weights = np.array([spec.weight for spec in requests])
        self._shares = weights / weights.sum()
        self._rng = np.random.default_rng([scenario.seed, share, 0xA5C])
        self._choices: list[int] = []
        self._streams = [
            _Stream(spec, at, scenario.seed, share, shares, num_ids_by_table) for at, spec in enumerate(requests)
        ]
        total = expected(scenario)
        for stream, part in zip(self._streams, self._shares, strict=True):
            mean = math.inf if total is None else total / shares * part
            stream.make_ahead(mean + 5 * math.sqrt(mean) + 1, MAX_REQUESTS * part, MAX_BYTES / len(requests))
        self.notes = list(dict.fromkeys(note for stream in self._streams for note in stream.notes))

    def next(self, second: float) -> PreparedRequest:
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
        self, spec: RequestSpec, at: int, seed: int, share: int, shares: int, num_ids_by_table: Mapping[str, int]
    ) -> None:
        self.spec = spec
        replay = spec.ids.kind == "replay"
        self.live = replay or (spec.ids.kind == "hot" and spec.ids.drift > 0)
        # shares of a recording have sizes in common: see ReplayIds
        self.sizes = Batches(spec.batch, [seed, 0 if replay else share, at, 0xBA7])
        self.ids: list[IdStream] = []
        for place, table in enumerate(spec.tables):
            num_ids = spec.ids.num_ids or num_ids_by_table.get(table, 0)
            if not num_ids and not spec.ids.file:
                raise ScenarioError(f"requests: ids of table {table!r} are no range: set ids.num_ids, or ids.file")
            self.ids.append(id_stream(spec.ids, num_ids, seed, share, shares, salt=1000 * at + place))
        self.replays = [ids for ids in self.ids if isinstance(ids, ReplayIds)]
        self.notes = [ids.note for ids in self.replays if ids.note]
        self.made: list[PreparedRequest] = []
        self.next_at = 0
        self.begun_again = False

    def make_ahead(self, needed: float, max_requests: float, max_bytes: float) -> None:
        """As many as are needed, within the limits but one at least; none of what is made on demand."""
        if self.live:
            return
        wanted, num_bytes = max(1, math.ceil(min(needed, max_requests))), 0.0
        while len(self.made) < wanted and num_bytes < max_bytes:
            for request in self._block(wanted - len(self.made)):
                num_bytes += len(request.body) + OVERHEAD
                self.made.append(request)
                if num_bytes >= max_bytes:
                    break

    def next(self, second: float) -> PreparedRequest:
        if self.live:
            sizes = self.sizes.draw(len(self.ids)).tolist()
            return prepare(self.spec, [ids.draw(n, second) for ids, n in zip(self.ids, sizes, strict=True)])
        if self.next_at == len(self.made):
            self.next_at, self.begun_again = 0, True
        request = self.made[self.next_at]
        self.next_at += 1
        return request

    @property
    def cycled(self) -> bool:
        return self.begun_again or any(ids.cycled for ids in self.replays)

    def _block(self, most: int) -> list[PreparedRequest]:
        """Some requests at once: to draw their ids one by one would take longer."""
        num = max(1, min(most, IDS_AT_ONCE // (len(self.ids) * largest(self.spec.batch))))
        sizes_TR = self.sizes.draw(num * len(self.ids)).reshape(len(self.ids), num)
        ids = [_cut(ids.draw(int(sizes.sum()), 0.0), sizes) for ids, sizes in zip(self.ids, sizes_TR, strict=True)]
        return [prepare(self.spec, parts) for parts in zip(*ids, strict=True)]


def _cut(ids: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    ends = [0, *np.cumsum(sizes).tolist()]
    return [ids[begin:end] for begin, end in pairwise(ends)]
