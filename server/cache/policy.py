"""Whether lookups ask a cache first, decided per size of batch by what it costs here and now.

Three ways to answer: compute; take what the tier in this process has and compute the rest (local); ask Redis for that
rest before computing it (redis). `off` always computes, `on` always asks, `auto` measures:

* At load a hit is timed against computing. Where a hit saves too little, computing stays, and one lookup in 1,024 is
  timed in case computing has become slow.
* Elsewhere the tier is tried for a while, so that it can fill. It stays if its lookups, misses included, cost less
  than computing does, of which one lookup in 64 is a sample. If not, it is tried again later, and ever more rarely.
* Redis is tried where the misses of a lookup take longer to compute than a round trip. It stays while asking for a row
  takes less time than computing one times the share of rows that it has.

Lookups of different sizes are compared by what computing them took at load. A cache is enabled by a clear gain, and
disabled by any loss. Nothing is random: the same times give the same decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from server.metrics.families import BATCHES, CHOICES

COMPUTE, LOCAL, REDIS = CHOICES
MODES = ("off", "on", "auto")
BATCH_SIZES = (8, 64, 512, 2048)
"""A typical number of ids of each of BATCHES."""
TRIAL_COST_RATIO = 0.7
"""A tier is tried where a hit costs less than this share of computing,"""
WORTH_S = 10e-6
"""and a lookup saves this much: a request that is just the table's own lookup takes fewer calls around it."""
ENABLE_BELOW_RATIO, DISABLE_ABOVE_RATIO = 0.9, 1.0
"""Cost as a share of computing, below which a cache is used and above which it no longer is."""
TRIAL_S = 10.0
TRIAL_SAMPLES = 64
RETRIAL_BACKOFF_S, MAX_RETRIAL_BACKOFF_S = 30.0, 600.0
ROUND_TRIP_S = 100e-6
"""What asking Redis costs at the very least."""
SETTLED_MASK = 1023
"""Where lookups compute, one in so many (and one) is timed."""
TIMED_MASK = 7
COMPUTED_OF_TIMED = 8
DECAY = 15 / 16
OUTLIER = 4.0


class Cost:
    """What lookups cost of late, as a multiple of what computing them was expected to; a far outlier counts less."""

    __slots__ = ("_expected", "_hits", "_ids", "_seconds", "samples")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self._seconds = self._expected = self._ids = self._hits = 0.0
        self.samples = 0

    def add(self, num_ids: int, seconds: float, hits: int, expected: float) -> None:
        """One observation."""
        if self.samples >= 4:
            seconds = min(seconds, OUTLIER * expected * self._seconds / self._expected)
        self._seconds = self._seconds * DECAY + seconds
        self._expected = self._expected * DECAY + expected
        self._ids = self._ids * DECAY + num_ids
        self._hits = self._hits * DECAY + hits
        self.samples += 1

    @property
    def ratio(self) -> float | None:
        """Of the last few dozen observations; None while there is none."""
        return self._seconds / self._expected if self.samples else None

    @property
    def hit_rate(self) -> float:
        """Share of hits."""
        return self._hits / self._ids if self._ids else 0.0

    @property
    def ns_per_id(self) -> float | None:
        """Nanoseconds a row, rounded; for people, since it depends on the number of ids."""
        return round(1e9 * self._seconds / self._ids, 1) if self._ids else None


class _Batch:
    """What is known and decided for one range of batch sizes."""

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.choice = COMPUTE
        self.base = COMPUTE
        """Where lookups go back to when Redis does not pay."""
        self.count = self.timed = 0
        self.mask = SETTLED_MASK
        self.compute, self.local, self.redis = Cost(), Cost(), Cost()
        self.hit_ratio: float | None = None
        """A lookup of nothing but hits, as a multiple of computing it, at load."""
        self.in_trial = False
        self.trial_ends = 0.0
        self.local_at, self.redis_at = now, now
        """When each may be tried (again)."""
        self.local_pause = self.redis_pause = RETRIAL_BACKOFF_S
        self.num_ids = 0.0
        """Rows that a lookup would ask Redis for, on average."""

    def skips(self) -> bool:
        """Whether the next lookup is computed and not timed; counted where it is."""
        if self.choice != COMPUTE or not (self.count + 1) & self.mask:
            return False
        self.count += 1
        return True


def _batch_class(num_ids: int) -> int:
    """Index into BATCHES of a lookup of this many ids."""
    return 0 if num_ids < 16 else 1 if num_ids < 128 else 2 if num_ids < 1024 else 3


class CachePolicy:
    """Chooses, and learns from what is observed. Calls of several threads may lose an observation, nothing else."""

    def __init__(
        self,
        mode: str,
        *,
        redis: bool = False,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[str, str], None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"cache must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self._redis, self._clock, self._changed = redis, clock, changed
        self._batches = [_Batch(name, clock()) for name in BATCHES]
        self._points: list[tuple[int, float]] = []
        self._fixed = {"off": COMPUTE, "on": REDIS if redis else LOCAL, "auto": None}[mode]
        for batch in self._batches:
            self._set(batch, self._fixed or COMPUTE)

    def measured(self, batch: str, compute_seconds: float, hit_seconds: float) -> None:
        """What a lookup of a typical size costs at load, computed and from a full tier: decides where to begin."""
        at = BATCHES.index(batch)
        known = self._batches[at]
        self._points = sorted([*self._points, (BATCH_SIZES[at], compute_seconds)])
        known.compute.add(BATCH_SIZES[at], compute_seconds, 0, compute_seconds)
        known.hit_ratio = hit_seconds / compute_seconds
        if self._fixed is None and self._local_may_pay(known):
            self._begin_trial(known, LOCAL)

    def choose(self, num_ids: int) -> tuple[str, bool]:
        """How to answer a lookup of so many ids, and whether to time and `observe` it."""
        if self._fixed is not None:
            return self._fixed, False
        at = _batch_class(num_ids)
        batch = self._batches[at]
        batch.count += 1
        if batch.count & batch.mask:
            return batch.choice, False
        return self._choose_timed(batch), True

    def skip_check(self, num_ids: int) -> Callable[[], bool]:
        """Says before each lookup of this many ids whether it is computed and not timed; counts it where it is."""
        if self._fixed is not None:
            computes = self._fixed == COMPUTE
            return lambda: computes
        return self._batches[_batch_class(num_ids)].skips

    def observe(self, choice: str, num_ids: int, seconds: float, hits: int = 0, asked: int | None = None) -> None:
        """What a timed lookup of `num_ids` cost, and how many of them the tier had.

        Of `redis`: how long Redis took to answer for the `asked` rows that were left, and how many it had.
        """
        rows = num_ids if asked is None else asked
        if self._fixed is None and rows:
            at = _batch_class(num_ids)
            self._observe(self._batches[at], choice, rows, seconds, hits)

    def expected(self, num_ids: float) -> float:
        """Seconds that computing so many rows took at load; a second a row where nothing was measured."""
        points = self._points
        if len(points) < 2:
            return points[0][1] / points[0][0] * num_ids if points else num_ids
        right = next((i for i in range(1, len(points) - 1) if num_ids <= points[i][0]), len(points) - 1)
        (n0, t0), (n1, t1) = points[right - 1], points[right]
        return max(t0 + (t1 - t0) * (num_ids - n0) / (n1 - n0), t0 * min(1.0, num_ids / n0))

    def uses_tier(self) -> bool:
        """Whether some lookups go through the tier in this process."""
        return any(batch.choice != COMPUTE for batch in self._batches)

    def describe(self) -> dict[str, Any]:
        """Choice, nanoseconds a row of each way and shares of hits, for each size of batch."""
        return {
            "mode": self.mode,
            "batches": {
                batch.name: {
                    "choice": batch.choice,
                    "ns_per_id": {
                        COMPUTE: batch.compute.ns_per_id,
                        LOCAL: batch.local.ns_per_id,
                        REDIS: batch.redis.ns_per_id,
                    },
                    "hit_rate": {LOCAL: round(batch.local.hit_rate, 3), REDIS: round(batch.redis.hit_rate, 3)},
                }
                for batch in self._batches
            },
        }

    def _choose_timed(self, batch: _Batch) -> str:
        """One lookup in a few: it is timed, and it is time to think."""
        if batch.choice == COMPUTE:
            if self._clock() >= batch.local_at and self._local_may_pay(batch):
                self._begin_trial(batch, LOCAL)
            else:
                self._consider_redis(batch)
            return batch.choice
        batch.timed += 1
        if batch.timed % COMPUTED_OF_TIMED == 0:
            return COMPUTE
        if batch.choice == LOCAL and not batch.in_trial:
            self._consider_redis(batch)
        return batch.choice

    def _observe(self, batch: _Batch, choice: str, num_ids: int, seconds: float, hits: int) -> None:
        cost = batch.compute if choice == COMPUTE else batch.local if choice == LOCAL else batch.redis
        cost.add(num_ids, seconds, hits, self.expected(num_ids))
        if choice == batch.choice != REDIS:
            missed = num_ids - hits
            batch.num_ids += (missed - batch.num_ids) / 16 if batch.num_ids else missed
        if choice != batch.choice or choice == COMPUTE or cost.samples % 16:
            return
        if choice == LOCAL:
            self._judge_local(batch)
        else:
            self._judge_redis(batch)

    def _judge_local(self, batch: _Batch) -> None:
        local, compute = batch.local.ratio, batch.compute.ratio
        if local is None or compute is None or not self._trial_is_over(batch, batch.local):
            return
        if local > compute * (ENABLE_BELOW_RATIO if batch.in_trial else DISABLE_ABOVE_RATIO):
            batch.local_at = self._clock() + batch.local_pause
            batch.local_pause = min(2 * batch.local_pause, MAX_RETRIAL_BACKOFF_S)
            self._decide(batch, COMPUTE)
        elif batch.in_trial:
            batch.local_pause = RETRIAL_BACKOFF_S
            self._decide(batch, LOCAL)

    def _judge_redis(self, batch: _Batch) -> None:
        asking, compute = batch.redis.ratio, batch.compute.ratio
        if asking is None or compute is None:
            return
        hopeless = asking > compute  # were every row a hit
        if not hopeless and not self._trial_is_over(batch, batch.redis):
            return
        if asking > batch.redis.hit_rate * compute * (ENABLE_BELOW_RATIO if batch.in_trial else DISABLE_ABOVE_RATIO):
            batch.redis_at = self._clock() + batch.redis_pause
            batch.redis_pause = min(2 * batch.redis_pause, MAX_RETRIAL_BACKOFF_S)
            self._decide(batch, batch.base)
        elif batch.in_trial:
            batch.redis_pause = RETRIAL_BACKOFF_S
            self._decide(batch, REDIS)

    def _local_may_pay(self, batch: _Batch) -> bool:
        """Whether lookups of nothing but hits would be faster by enough: the cache costs a request calls of its own."""
        compute = batch.compute.ratio
        if compute is None or batch.hit_ratio is None:
            return compute is not None
        saved = self.expected(BATCH_SIZES[BATCHES.index(batch.name)]) * (compute - batch.hit_ratio)
        return batch.hit_ratio < TRIAL_COST_RATIO * compute and saved > WORTH_S

    def _consider_redis(self, batch: _Batch) -> None:
        """Begin to ask Redis where computing the misses takes longer than a round trip."""
        compute = batch.compute.ratio
        if (
            self._redis
            and compute is not None
            and self.expected(batch.num_ids) * compute > ROUND_TRIP_S
            and self._clock() >= batch.redis_at
        ):
            batch.base = batch.choice
            self._begin_trial(batch, REDIS)

    def _begin_trial(self, batch: _Batch, choice: str) -> None:
        (batch.local if choice == LOCAL else batch.redis).clear()
        batch.in_trial = True
        batch.trial_ends = 0.0
        self._set(batch, choice)

    def _trial_is_over(self, batch: _Batch, cost: Cost) -> bool:
        """Always, when there is no trial; else after some time of lookups, counted from the first."""
        if not batch.in_trial:
            return True
        now = self._clock()
        if not batch.trial_ends:
            batch.trial_ends = now + TRIAL_S
        return now >= batch.trial_ends and cost.samples >= TRIAL_SAMPLES

    def _decide(self, batch: _Batch, choice: str) -> None:
        batch.in_trial = False
        self._set(batch, choice)

    def _set(self, batch: _Batch, choice: str) -> None:
        batch.choice = choice
        batch.mask = SETTLED_MASK if choice == COMPUTE else TIMED_MASK
        if self._changed:
            self._changed(batch.name, choice)
