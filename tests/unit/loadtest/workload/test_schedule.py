"""When requests are due, and which come next: phases add up, shares add up, nothing depends on the clock of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Batch, IdDistribution, Phase, RequestSpec, Scenario
from loadtest.workload import request_stream
from loadtest.workload.request_stream import RequestStream
from loadtest.workload.schedule import due_offsets, expected

TABLES = {"item": 1000, "user": 1000}


def due(scenario: Scenario, share: int = 0, shares: int = 1) -> NDArray[np.float64]:
    """Seconds from the start of the run."""
    return np.array(list(due_offsets(scenario, share, shares)), np.int64) / 1e9


def even(*phases: Phase, **fields: Any) -> Scenario:
    """Constant arrivals."""
    return Scenario(arrivals="constant", phases=phases, **fields)


def test_constant_arrivals_are_even() -> None:
    """The first is due at once, the last before the end, all at the same distance."""
    np.testing.assert_allclose(due(even(Phase(seconds=2, rate=4))), np.arange(8) / 4, atol=1e-8)


def test_phases_follow_each_other() -> None:
    """Warm-up, load, a pause of rate 0 and less load come one after the other at their own rates."""
    phases = [Phase(seconds=1, rate=10, warmup=True), Phase(seconds=2, rate=100), Phase(seconds=3, rate=0)]
    times = due(even(*phases, Phase(seconds=4, rate=5)))
    counts = [int(((times >= begin) & (times < end)).sum()) for begin, end in [(0, 1), (1, 3), (3, 6), (6, 10)]]
    assert counts == [10, 200, 0, 20]
    assert len(times) == 230


@pytest.mark.parametrize(("rate", "to"), [(0.0, 40.0), (40.0, 0.0), (10.0, 30.0)], ids=["up", "down", "between"])
def test_a_ramp_is_even_in_what_it_adds_up_to(rate: float, to: float) -> None:
    """The k-th request is due when the integral of the rate is k."""
    seconds = 10.0
    times = due(even(Phase(seconds=seconds, rate=rate, rate_to=to)))
    sums = rate * times + (to - rate) / seconds * times**2 / 2
    np.testing.assert_allclose(sums, np.arange(200), atol=1e-6)


def test_shares_of_constant_arrivals_are_together_even() -> None:
    """Three processes make the schedule of one, request by request in turn."""
    whole = even(Phase(seconds=3, rate=30, rate_to=90), Phase(seconds=1, rate=7))
    parts = [due(whole, share, 3) for share in range(3)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), due(whole))
    np.testing.assert_array_equal(parts[1], due(whole)[1::3])


@pytest.mark.parametrize("shares", [1, 4])
def test_poisson_arrivals_are_poisson(shares: int) -> None:
    """Gaps of all shares together are exponential, and counts vary as much as they are large."""
    scenario = Scenario(phases=(Phase(seconds=400, rate=100),), seed=2)
    times = np.sort(np.concatenate([due(scenario, share, shares) for share in range(shares)]))
    gaps, counts = np.diff(times), np.bincount(times.astype(int), minlength=400)
    assert len(times) == pytest.approx(40_000, abs=5 * 200)
    assert np.quantile(gaps, [0.5, 0.9, 0.99]) * 100 == pytest.approx(-np.log([0.5, 0.1, 0.01]), rel=0.05)
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.3)


def test_poisson_arrivals_follow_a_ramp() -> None:
    """Of a ramp from nothing a quarter comes in the first half, and the same seed gives the same times."""
    scenario = Scenario(phases=(Phase(seconds=100, rate=0, rate_to=200),), seed=3)
    times = due(scenario)
    assert len(times) == pytest.approx(10_000, abs=500)
    assert np.mean(times < 50) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(times, due(scenario))
    assert not np.array_equal(times[:100], due(scenario, 1, 2)[:100])
    assert expected(scenario) == 10_000


def recording(folder: Path, *, speed: float = 1.0, size: int = 1, seconds: float = 10.0) -> Scenario:
    """Six clicks in five seconds, replayed."""
    path = folder / "clicks.parquet"
    pl.DataFrame({"item_id": [5, 6, 7, 8, 9, 10], "t": [1000, 1500, 1500, 3000, 5000, 6000]}).write_parquet(path)
    keys = IdDistribution(kind="replay", file=str(path), time_column="t", speed=speed)
    return Scenario(requests=(RequestSpec(ids=keys, batch=Batch(size=size)),), phases=(Phase(seconds=seconds, rate=0),))


def asked(scenario: Scenario, count: int, share: int = 0, shares: int = 1) -> list[list[int]]:
    """The ids of the next requests."""
    made = RequestStream(scenario, share, shares, TABLES)
    return [np.frombuffer(made.next(0.0).body, "<i8").tolist() for _ in range(count)]


def test_a_recording_has_its_own_clock(tmp_path: Path) -> None:
    """Requests are due as recorded, from the start of the recording, at a multiple of its speed, until the end."""
    np.testing.assert_array_equal(due(recording(tmp_path)), [0, 0.5, 0.5, 2, 4, 5])
    np.testing.assert_array_equal(due(recording(tmp_path, speed=2, seconds=2)), [0, 0.25, 0.25, 1])
    assert expected(recording(tmp_path)) is None


def test_several_clicks_make_a_request_when_the_last_has_come(tmp_path: Path) -> None:
    """Requests of more than one id are due when all of them were asked for."""
    scenario = recording(tmp_path, size=2)
    np.testing.assert_array_equal(due(scenario), [0.5, 2, 5])
    assert asked(scenario, 3) == [[5, 6], [7, 8], [9, 10]]


def test_shares_of_a_recording_keep_ids_with_their_times(tmp_path: Path) -> None:
    """Each process has every other click, its time and its id."""
    scenario = recording(tmp_path)
    assert [due(scenario, share, 2).tolist() for share in (0, 1)] == [[0, 0.5, 4], [0.5, 2, 5]]
    assert [asked(scenario, 3, share, 2) for share in (0, 1)] == [[[5], [7], [9]], [[6], [8], [10]]]


def test_kinds_come_by_weight() -> None:
    """Asks are mixed at random by their weights; one of weight 0 never comes."""
    requests = tuple(
        RequestSpec(name=name, weight=weight, batch=Batch(size=1))
        for name, weight in [("a", 3.0), ("b", 1.0), ("c", 0.0)]
    )
    made = RequestStream(Scenario(requests=requests), 0, 1, TABLES)
    kinds = [made.next(0.0).kind for _ in range(8000)]
    assert kinds.count("a") / 8000 == pytest.approx(0.75, abs=0.03)
    assert kinds.count("c") == 0


def test_tables_have_ids_of_their_own() -> None:
    """One request of two tables asks different ids of each; another seed, or another share, other ones."""
    spec = RequestSpec(tables=("item", "user"), protocol="json", batch=Batch(size=20))
    bodies = {
        RequestStream(Scenario(requests=(spec,), seed=seed), share, 2, TABLES).next(0.0).body
        for seed in (0, 1)
        for share in (0, 1)
    }
    assert len(bodies) == 4
    for body in bodies:
        item, user = body.split(b"user")
        assert item.split(b"[")[1].split(b"]")[0] != user.split(b"[")[1].split(b"]")[0]


def test_as_much_is_made_ahead_as_the_run_needs() -> None:
    """A run that sends less than the limit sees no request twice."""
    scenario = Scenario(phases=(Phase(seconds=10, rate=100),), requests=(RequestSpec(batch=Batch(size=8)),))
    made = RequestStream(scenario, 0, 1, TABLES)
    bodies = {made.next(0.0).body for _ in range(1000)}
    assert not made.cycled
    assert len(bodies) == 1000


def test_requests_come_again_when_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the same requests come in the same order, and the source says so."""
    monkeypatch.setattr(request_stream, "MAX_BYTES", 10 * (request_stream.OVERHEAD + 800))
    made = RequestStream(Scenario(mode="closed"), 0, 1, TABLES)
    first = [made.next(0.0).body for _ in range(10)]
    assert not made.cycled
    assert [made.next(0.0).body for _ in range(10)] == first
    assert made.cycled


def test_a_hot_set_drifts_in_the_requests() -> None:
    """What drifts is asked for as of the second in which it is sent."""
    keys = IdDistribution(kind="hot", hot_ids=10, hot_share=1.0, drift=1.0)
    made = RequestStream(Scenario(requests=(RequestSpec(ids=keys),)), 0, 1, TABLES)
    now, same, later = (set(np.frombuffer(made.next(at).body, "<i8").tolist()) for at in (0.0, 0.0, 60.0))
    assert now == same
    assert not now & later


def test_a_table_without_a_range_of_ids_is_told() -> None:
    """Where the server has no ids to draw from, the scenario must name some."""
    with pytest.raises(ScenarioError, match=r"ids of table 'word' are no range: set ids.num_ids, or ids.file$"):
        RequestStream(Scenario(requests=(RequestSpec(tables=("word",)),)), 0, 1, TABLES)


def test_notes_of_a_recording_reach_the_report(tmp_path: Path) -> None:
    """That ids were numbered anew is said once."""
    made = RequestStream(recording(tmp_path), 0, 1, {"item": 6})
    assert made.notes == [
        f"ids of {tmp_path}/clicks.parquet run from 5 to 10, beyond the 6 there are: numbered by first appearance"
    ]
