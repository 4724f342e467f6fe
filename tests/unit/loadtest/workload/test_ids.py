"""Ids and batch sizes of a load are seeded, in range, and distributed as the scenario says."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Batch, IdDistribution
from loadtest.workload import permutation
from loadtest.workload.batch_sizes import Batches
from loadtest.workload.ids import id_stream
from loadtest.workload.permutation import Permutation

DRAWS = 200_000


def counted(keys: IdDistribution, num_ids: int, second: float = 0.0) -> NDArray[np.int64]:
    """How often each id is drawn."""
    ids = id_stream(keys, num_ids, 1).draw(DRAWS, second)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < num_ids
    return np.bincount(ids, minlength=num_ids)


def excess(counts: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """By how many standard deviations chi-squared lies above what is expected of draws from `shares`."""
    wanted = DRAWS * shares / shares.sum()
    freedom = len(counts) - 1
    return float((((counts - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.999999, 1.0, 1.05, 2.0])
def test_zipf_is_zipf(exponent: float) -> None:
    """The k-th most frequent id has its share by the law, for exponents below, at and above 1."""
    num_ids = 40
    counts = counted(IdDistribution(kind="zipf", exponent=exponent), num_ids)
    by_rank = counts[Permutation(num_ids, 1)(np.arange(num_ids))]
    assert excess(by_rank, np.arange(1, num_ids + 1) ** -exponent) < 4


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.2])
def test_zipf_of_many_ids_needs_no_table(exponent: float) -> None:
    """A hundred million ids are drawn by the same law in memory that they do not fill."""
    num_ids = 100_000_000
    tracemalloc.start()
    ids = id_stream(IdDistribution(kind="zipf", exponent=exponent), num_ids, 1).draw(DRAWS, 0.0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 * DRAWS
    total = np.sum(np.arange(1, 1_000_001) ** -exponent)
    total += (
        np.log(num_ids / 1e6) if exponent == 1 else (num_ids ** (1 - exponent) - 1e6 ** (1 - exponent)) / (1 - exponent)
    )
    first = Permutation(num_ids, 1)(np.arange(3))
    for rank, id_ in enumerate(first, 1):
        wanted = DRAWS * rank**-exponent / total
        assert abs(np.count_nonzero(ids == id_) - wanted) < 5 * np.sqrt(wanted) + 5


def test_uniform_is_even() -> None:
    """Every id comes as often as every other."""
    assert excess(counted(IdDistribution(kind="uniform"), 40), np.ones(40)) < 4


def test_one_id_is_all_there_is() -> None:
    """A table of one id is asked for that one."""
    for kind in ("zipf", "uniform"):
        assert id_stream(IdDistribution(kind=kind), 1, 0).draw(5, 0.0).tolist() == [0] * 5  # type: ignore[arg-type]


def test_a_hot_set_has_its_share() -> None:
    """The hot ids have `hot_share` of the accesses, evenly; the others share the rest evenly."""
    counts = counted(IdDistribution(kind="hot", hot_ids=10, hot_share=0.8), 50)
    shares = np.full(50, 0.2 / 40)
    shares[Permutation(50, 1)(np.arange(10))] = 0.8 / 10
    assert excess(counts, shares) < 4


def test_a_hot_set_drifts_with_time() -> None:
    """The set moves by `drift` of its size a minute, back in time too, whatever was drawn before."""
    keys = IdDistribution(kind="hot", hot_ids=20, hot_share=1.0, drift=0.5)

    def hot(second: float) -> set[int]:
        return set(np.flatnonzero(counted(keys, 100, second)).tolist())

    at_once = hot(0.0)
    kept = {second: len(at_once & hot(second)) for second in (5.0, 6.0, 60.0, 120.0, -6.0)}
    assert len(at_once) == 20
    assert kept == {5.0: 20, 6.0: 19, 60.0: 10, 120.0: 0, -6.0: 19}
    assert hot(600.0) == at_once  # once through all ids


def test_a_hot_set_must_leave_others() -> None:
    """As many hot ids as there are ids is refused by name."""
    with pytest.raises(ScenarioError, match=r"^ids.hot_ids must be at least 1 and below the 100 ids, got 100$"):
        id_stream(IdDistribution(kind="hot", hot_ids=100), 100, 0)


@pytest.mark.parametrize("kind", ["zipf", "uniform", "hot"])
def test_shares_agree_on_what_is_frequent_and_draw_apart(kind: Any) -> None:
    """The same seed, share and salt draw the same; another share draws other ids from the same law."""
    keys = IdDistribution(kind=kind, exponent=2.0, hot_ids=1, hot_share=0.9)
    one, same, other, salted = (
        id_stream(keys, 1000, 5, *share, salt=salt).draw(2000, 0.0)
        for share, salt in [((0, 2), 0), ((0, 2), 0), ((1, 2), 0), ((0, 2), 1)]
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != salted).any()
    if kind != "uniform":
        assert len({int(np.bincount(ids).argmax()) for ids in (one, other, salted)}) == 1
        assert np.bincount(id_stream(keys, 1000, 6).draw(2000, 0.0)).argmax() != np.bincount(one).argmax()


@pytest.mark.parametrize("n", [1, 2, 3, 50, 4096, 100_000])
def test_scattering_is_a_permutation(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number goes somewhere else than every other, and where it goes is the same with a table and without."""
    tabled = Permutation(n, 3)(np.arange(n))
    assert np.array_equal(np.sort(tabled), np.arange(n))
    monkeypatch.setattr(permutation, "TABLE", 0)
    np.testing.assert_array_equal(Permutation(n, 3)(np.arange(n)), tabled)


def test_scattering_leaves_no_order() -> None:
    """The first thousand of ten million numbers lie evenly over them, and so do the steps from one to the next."""
    n, cells = 10_000_000, 20
    places = Permutation(n, 3)(np.arange(1001))
    for values in (places, np.diff(places) % n, places % cells * (n // cells)):
        counts = np.bincount(values * cells // n, minlength=cells)
        assert ((counts - 50) ** 2 / 50).sum() < 45


def recorded(folder: Path, **columns: Any) -> str:
    """A recording."""
    path = folder / "keys.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return str(path)


def test_a_replay_is_the_recording_in_order(tmp_path: Path) -> None:
    """Ids come as recorded, and from the start again after the end, which is said."""
    file = recorded(tmp_path, item_id=[3, 1, 4, 1, 5])
    stream: Any = id_stream(IdDistribution(kind="replay", file=file), 10, 0)
    assert [stream.draw(2, 0.0).tolist() for _ in range(2)] == [[3, 1], [4, 1]]
    assert not stream.cycled
    assert [stream.draw(3, 0.0).tolist() for _ in range(2)] == [[5, 3, 1], [4, 1, 5]]
    assert stream.cycled
    assert stream.draw(0, 0.0).tolist() == []


def test_shares_of_a_replay_are_together_the_recording(tmp_path: Path) -> None:
    """Several processes take turns, request by request, also when requests differ in size."""
    file = recorded(tmp_path, item_id=list(range(30)))
    shares = [id_stream(IdDistribution(kind="replay", file=file), 30, 0, share, 3) for share in range(3)]
    dealt = [share.draw(count, 0.0).tolist() for count in (2, 3, 5) for share in shares]
    assert [id_ for ids in dealt for id_ in ids] == list(range(30))


def test_ids_beyond_the_table_are_numbered_anew(tmp_path: Path) -> None:
    """Ids that the table cannot have get numbers by first appearance, and a note says so; `as_recorded` leaves them."""
    file = recorded(tmp_path, item_id=[900, 7, 900, 8])
    stream: Any = id_stream(IdDistribution(kind="replay", file=file), 10, 0)
    assert stream.draw(4, 0.0).tolist() == [0, 1, 0, 2]
    assert stream.note == f"ids of {file} run from 7 to 900, beyond the 10 there are: numbered by first appearance"
    fewer: Any = id_stream(IdDistribution(kind="replay", file=file), 2, 0)
    assert fewer.note.endswith("; the last 1 of 3 are requested though the table lacks them")
    kept: Any = id_stream(IdDistribution(kind="replay", file=file, as_recorded=True), 10, 0)
    assert (kept.draw(4, 0.0).tolist(), kept.note) == ([900, 7, 900, 8], "")


def test_a_recording_out_of_order_is_replayed_by_its_clock(tmp_path: Path) -> None:
    """With a column of times, ids come in the order of those."""
    file = recorded(tmp_path, item_id=[1, 2, 3], t=[30, 10, 20])
    keys = IdDistribution(kind="replay", file=file, time_column="t")
    assert id_stream(keys, 10, 0).draw(3, 0.0).tolist() == [2, 3, 1]


def test_other_kinds_draw_from_the_ids_of_a_file(tmp_path: Path) -> None:
    """Where ids are no range, they are those of a file: strings and sparse integers alike."""
    file = recorded(tmp_path, word=["b", "a", "b", "é"], number=[1 << 60, -3, 1 << 60, 9])
    words = id_stream(IdDistribution(kind="uniform", file=file, column="word"), 0, 0).draw(100, 0.0)
    assert set(words.tolist()) == {"a", "b", "é"}
    numbers = id_stream(IdDistribution(kind="zipf", file=file, column="number"), 0, 0).draw(100, 0.0)
    assert set(numbers.tolist()) == {1 << 60, -3, 9}
    replayed = id_stream(IdDistribution(kind="replay", file=file, column="word"), 0, 0).draw(4, 0.0)
    assert replayed.tolist() == ["b", "a", "b", "é"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file": "no.parquet"}, "ids.file 'no.parquet' is no file"),
        ({"column": "item"}, "ids.column: FILE has no column 'item'; it has item_id, real, name, gap"),
        ({"column": "real"}, "ids.column: column 'real' of FILE must hold integers or strings, it holds Float64"),
        ({"time_column": "name"}, "ids.time_column: column 'name' of FILE must hold milliseconds, it holds String"),
        ({"column": "gap"}, "ids.file: column 'gap' of FILE lacks 1 of its values"),
    ],
    ids=["file", "column", "type of ids", "times", "gaps"],
)
def test_a_recording_that_is_none_is_told(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    """What is wrong with a file of keys is one line that names file and column."""
    file = recorded(tmp_path, item_id=[1, 2], real=[0.5, 1.5], name=["a", "b"], gap=[1, None])
    keys = IdDistribution(kind="replay", **({"file": file} | fields))  # type: ignore[arg-type]
    with pytest.raises(ScenarioError) as told:
        id_stream(keys, 10, 0)
    assert str(told.value) == message.replace("FILE", file)


def test_a_file_that_is_no_parquet_is_told(tmp_path: Path) -> None:
    """Another format is named as what it is not."""
    (tmp_path / "keys.csv").write_text("item_id\n1\n")
    with pytest.raises(ScenarioError, match=r"keys.csv' is no Parquet file: "):
        id_stream(IdDistribution(kind="replay", file=str(tmp_path / "keys.csv")), 10, 0)


@pytest.mark.parametrize(
    ("batch", "smallest", "largest", "mean"),
    [
        (Batch(size=7), 7, 7, 7.0),
        (Batch(kind="uniform", min=3, max=9), 3, 9, 6.0),
        (Batch(kind="lognormal", size=100, sigma=0.5, max=10_000), 5, 2000, 100 * np.exp(0.125)),
        (Batch(kind="lognormal", size=2, sigma=2.0, max=5), 1, 5, 2.745),
        (Batch(kind="choice", sizes=(1, 10), weights=(3, 1)), 1, 10, 3.25),
        (Batch(kind="choice", sizes=(1, 10)), 1, 10, 5.5),
    ],
    ids=["fixed", "uniform", "lognormal", "cut", "weighted", "even"],
)
def test_sizes_are_distributed_as_said(batch: Batch, smallest: int, largest: int, mean: float) -> None:
    """Sizes lie within their bounds, around their mean, and are the same for the same seed."""
    sizes = Batches(batch, 3).draw(50_000)
    assert sizes.dtype == np.int64
    assert smallest <= sizes.min() <= sizes.max() <= largest
    assert sizes.mean() == pytest.approx(mean, rel=0.02)
    np.testing.assert_array_equal(sizes, Batches(batch, 3).draw(50_000))
