"""The policy finds the cheapest way from what lookups cost, keeps to it, and finds it again when costs change."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from server.cache.policy import BATCH_SIZES, SETTLED_MASK, CachePolicy, Cost
from server.metrics.families import BATCHES

SIZES = dict(zip(BATCHES, BATCH_SIZES, strict=True))


@dataclass
class World:
    """Lookups that cost what is said here, on a clock that they move."""

    compute_ns: float
    hit_ns: float = 25.0
    hit_rate: float = 0.9
    redis_us: float = 300.0
    redis_ns: float = 1000.0
    redis_hit_rate: float = 0.95
    redis: bool = False
    fills_in: float = 0.0
    between_s: float = 0.001
    now: float = 1000.0
    choices: list[str] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = CachePolicy(
            "auto", redis=self.redis, clock=lambda: self.now, changed=lambda *change: self.changes.append(change)
        )
        self.began = self.now
        for batch in BATCHES:
            self.policy.measured(batch, SIZES[batch] * self.compute_ns * 1e-9, SIZES[batch] * self.hit_ns * 1e-9)

    def run(self, seconds: float, num_ids: int = 512) -> list[str]:
        """So many seconds of lookups; what was chosen for each."""
        end, chosen = self.now + seconds, []
        while self.now < end:
            choice, timed = self.policy.choose(num_ids)
            chosen.append(choice)
            cost_s, hits, asked = self.cost(choice, num_ids)
            self.now += self.between_s + cost_s
            if timed:
                if choice == "redis":
                    self.policy.observe("redis", num_ids, cost_s, hits, asked=asked)
                else:
                    self.policy.observe(choice, num_ids, cost_s, hits)
        return chosen

    def cost(self, choice: str, num_ids: int) -> tuple[float, int, int]:
        """Seconds, hits, rows asked of Redis."""
        if choice == "compute":
            return num_ids * self.compute_ns * 1e-9, 0, 0
        filled = min(1.0, (self.now - self.began) / self.fills_in) if self.fills_in else 1.0
        hits = int(num_ids * self.hit_rate * filled)
        misses = num_ids - hits
        if choice == "local":
            return (num_ids * self.hit_ns + misses * (self.compute_ns + 40)) * 1e-9, hits, 0
        return self.redis_us * 1e-6 + misses * self.redis_ns * 1e-9, int(misses * self.redis_hit_rate), misses

    def choice(self, num_ids: int = 512) -> str:
        """What is settled on now."""
        described = self.policy.describe()["batches"]
        return str(next(described[name]["choice"] for name, size in SIZES.items() if size >= num_ids))


def test_off_and_on_are_what_they_say() -> None:
    """`off` computes; `on` asks the tier, and Redis where there is one; neither measures."""
    for mode, redis, choice in (("off", True, "compute"), ("on", False, "local"), ("on", True, "redis")):
        policy = CachePolicy(mode, redis=redis)
        policy.measured("1-15", 1e-6, 1e-9)
        assert [policy.choose(n) for n in (1, 15, 16, 2000)] == [(choice, False)] * 4
        assert {b["choice"] for b in policy.describe()["batches"].values()} == {choice}
        assert policy.uses_tier() == (mode == "on")
    with pytest.raises(ValueError, match="off, on, auto"):
        CachePolicy("maybe")


def test_a_cheap_scheme_computes_and_hardly_looks() -> None:
    """A hit that saves nothing: every lookup computes, one in 1,024 is timed, no memory is taken."""
    world = World(compute_ns=25)
    assert set(world.run(30)) == {"compute"}
    assert not world.policy.uses_tier()
    timed = 0
    for _ in range(10 * (SETTLED_MASK + 1)):
        _, one = world.policy.choose(100)
        timed += one
    assert timed == 10


def test_choosing_costs_next_to_nothing_once_computing_is_settled() -> None:
    """Far less than the lookup that follows."""
    policy = CachePolicy("auto")
    for batch in BATCHES:
        policy.measured(batch, 25e-9 * SIZES[batch], 25e-9 * SIZES[batch])
    best = 1.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            policy.choose(100)
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 3e-6


def test_an_expensive_scheme_with_hot_rows_goes_local_and_stays() -> None:
    """It may fill first, though that costs more than computing; afterwards one timed lookup in eight computes."""
    world = World(compute_ns=3000, fills_in=8)
    chosen = world.run(60)
    assert world.choice() == "local"
    assert set(chosen) == {"local", "compute"}
    assert chosen.count("compute") == pytest.approx(len(chosen) / 64, rel=0.1)
    assert [change for change in world.changes if change[0] == "128-1023"] == [
        ("128-1023", "compute"),
        ("128-1023", "local"),  # from the start, on trial
        ("128-1023", "local"),  # for good
    ]


def test_traffic_without_hot_rows_goes_back_to_computing_and_tries_ever_more_rarely() -> None:
    """No hits: ten seconds of trial, then 30 s, 60 s, 120 s .. of computing."""
    world = World(compute_ns=3000, hit_rate=0.0)
    chosen = world.run(1500)
    trials = [change for change in world.changes if change == ("128-1023", "local")]
    assert 4 <= len(trials) <= 7
    assert chosen.count("local") < 0.1 * len(chosen)


def test_a_tier_gets_its_chance_when_traffic_becomes_skewed() -> None:
    """What did not pay is tried again, and kept when it does."""
    world = World(compute_ns=3000, hit_rate=0.0)
    world.run(60)
    assert world.choice() == "compute"
    world.hit_rate = 0.9
    world.run(200)
    assert world.choice() == "local"
    world.hit_rate = 0.0
    world.run(20)
    assert world.choice() == "compute"


def test_a_scheme_that_becomes_slow_is_noticed() -> None:
    """Computing that costs forty times what it did at load makes the tier worth a trial."""
    world = World(compute_ns=25)
    world.run(60)
    world.compute_ns = 1000
    world.run(120)
    assert world.choice() == "local"


def test_small_differences_do_not_make_it_change_its_mind() -> None:
    """Between a clear gain and a loss what is settled stays settled."""
    world = World(compute_ns=1000, hit_rate=0.3)
    world.run(30)
    assert world.choice() == "local"
    before = list(world.changes)
    world.hit_rate = 0.1  # costs about as much as computing
    world.run(30)
    assert world.changes == before


def test_redis_is_asked_where_it_beats_computing_the_misses() -> None:
    """3 us a row to compute, 1.7 us to ask for: large batches ask. Without a Redis nobody does."""
    world = World(compute_ns=3000, hit_rate=0.2, redis=True)
    world.run(60)
    assert world.choice() == "redis"
    world.redis_hit_rate = 0.3  # a hit has to pay for three misses now
    world.run(20)
    assert world.choice() == "local"
    world = World(compute_ns=3000, hit_rate=0.2)
    world.run(60)
    assert world.choice() == "local"


@pytest.mark.parametrize(
    ("world", "num_ids", "choice"),
    [
        (World(compute_ns=25, redis=True), 2048, "compute"),
        (World(compute_ns=3000, redis=True), 8, "local"),
        (World(compute_ns=3000, hit_rate=0.2, redis=True, redis_us=5000), 512, "local"),
        (World(compute_ns=3000, hit_rate=0.2, redis=True, redis_hit_rate=0.0), 512, "local"),
        (World(compute_ns=3000, hit_rate=0.0, redis=True), 512, "redis"),
    ],
    ids=["cheap", "few ids", "slow redis", "empty redis", "no hot rows"],
)
def test_where_redis_pays(world: World, num_ids: int, choice: str) -> None:
    """Cheap schemes and small batches never ask it; a slow or empty one is left; it may pay where the tier does not."""
    chosen = world.run(120, num_ids)
    assert world.choice(num_ids) == choice
    if num_ids != 512:
        assert "redis" not in chosen


def test_a_slow_redis_is_left_at_once() -> None:
    """When even a hit takes longer than computing, the trial does not go on for ten seconds."""
    world = World(compute_ns=3000, hit_rate=0.2, redis=True, redis_us=20_000)
    chosen = world.run(40)
    assert 0 < chosen.count("redis") < 300


def test_batches_of_different_size_are_judged_apart() -> None:
    """What large batches find out does not change what small ones do."""
    world = World(compute_ns=3000, hit_rate=0.2, redis=True)
    world.run(60, 512)
    described = world.policy.describe()["batches"]
    assert described["128-1023"]["choice"] == "redis"
    assert described["1-15"]["choice"] == "local"  # on trial still: nobody has asked
    assert described["128-1023"]["ns_per_id"]["compute"] == 3000.0
    assert described["128-1023"]["hit_rate"]["redis"] == pytest.approx(0.95, abs=0.01)


def test_the_same_times_give_the_same_decisions() -> None:
    """Nothing is random."""
    runs = [World(compute_ns=900, hit_rate=0.2, redis=True).run(50) for _ in range(2)]
    assert runs[0] == runs[1]


def test_lookups_of_other_sizes_do_not_look_slow() -> None:
    """One id costs more an id than eight do; that is no reason to try a tier."""
    now = [0.0]
    policy = CachePolicy("auto", clock=lambda: now[0])
    for batch, size in SIZES.items():
        policy.measured(batch, 2e-6 + 10e-9 * size, 2.5e-6 + 9e-9 * size)
    assert policy.expected(1) == pytest.approx(2.01e-6)
    assert policy.expected(100_000) == pytest.approx(1.002e-3)
    assert policy.expected(300) == pytest.approx(5e-6)
    for _ in range(100_000):
        now[0] += 0.001
        choice, timed = policy.choose(1)
        assert choice == "compute"
        if timed:
            policy.observe("compute", 1, 2.2e-6)
    assert CachePolicy("auto").expected(3) == 3


def test_a_cost_forgets_and_is_not_impressed_by_one_outlier() -> None:
    """A pause of the machine in one observation is not what a lookup costs."""
    cost = Cost()
    assert (cost.ratio, cost.hit_rate, cost.ns_per_id) == (None, 0.0, None)
    for _ in range(20):
        cost.add(100, 100e-6, 50, 100e-6)
    assert cost.ns_per_id == 1000.0
    assert cost.ratio == pytest.approx(1.0)
    assert cost.hit_rate == pytest.approx(0.5)
    cost.add(100, 1.0, 50, 100e-6)
    assert cost.ratio is not None
    assert cost.ratio < 1.5
    for _ in range(200):
        cost.add(100, 300e-6, 100, 100e-6)
    assert cost.ns_per_id == pytest.approx(3000, rel=0.01)
    assert cost.hit_rate == pytest.approx(1.0, rel=0.01)
