"""Events to rows: numbering, splits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from embstore.errors import ConfigError, DataError
from embstore.train.config import DataConfig
from embstore.train.data import Dataset, Pairs, read_dataset
from embstore.train.split import TEST, TRAIN, VALIDATION, leave_last_out

USERS = [7, 7, 7, 7, 9, 9, 5, 9]
ITEMS = ["b", "a", "c", "b", "a", "b", "a", "d"]
TIMES = [4, 2, 1, 3, 1, 1, 1, 9]


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig(**({"path": str(path), "user": "u", "item": "i", "time": "t"} | options))


def write(path: Path, **columns: Any) -> Path:
    frame = pl.DataFrame(columns)
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    return path


def by_key(dataset: Dataset, pairs: Pairs) -> set[tuple[Any, Any]]:
    users, items = dataset.users.ids, dataset.items.ids
    return {(users[u], items[i] if i >= 0 else None) for u, i in zip(pairs.users_E, pairs.items_E, strict=True)}


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_leave_last_out(tmp_path: Path, name: str) -> None:
    """The last event of a user is the test, the one before it validation; an item without training has no row."""
    path = write(tmp_path / name, u=USERS, i=ITEMS, t=TIMES)
    dataset = read_dataset(config(path), seed=0)
    assert by_key(dataset, dataset.train) == {(7, "c"), (7, "a"), (9, "a"), (5, "a")}
    assert by_key(dataset, dataset.validation) == {(7, None), (9, None)}
    assert by_key(dataset, dataset.test) == {(7, None), (9, None)}
    assert dataset.validation.items_E[0] == dataset.validation.items_E[1]  # both are item b
    assert dataset.test.items_E[0] != dataset.test.items_E[1]  # b and d: two unseen items, not one


def test_rows_by_frequency(tmp_path: Path) -> None:
    """Row 0 is the most frequent id of the training events, ties go by key, and the counts say how often."""
    path = write(tmp_path / "e.parquet", u=USERS, i=ITEMS, t=TIMES)
    dataset = read_dataset(config(path), seed=0)
    assert list(dataset.users.ids) == [7, 5, 9]
    assert dataset.items.ids == ["a", "c"]
    assert dataset.items.num_events_N.tolist() == [3, 1]


@forall(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=40),
    st.none() | st.integers(1, 4),
)
def test_leave_last_out_against_a_loop(events: list[tuple[int, int]], num_validation: int | None) -> None:
    """For any events, the parts are what sorting each user's events by (time, place in the file) gives."""
    frame = pl.DataFrame({"user": [u for u, _ in events], "time": [t for _, t in events]})
    part = leave_last_out(frame, num_validation, seed=0)["part"].to_list()
    may_validate = 0
    for user in {u for u, _ in events}:
        places = sorted((p for p, (u, _) in enumerate(events) if u == user), key=lambda p: (events[p][1], p))
        assert part[places[0]] == TRAIN
        assert [part[p] for p in places[1:][-1:]] == [TEST] * (len(places) > 1)
        assert all(part[p] == TRAIN for p in places[:-2])
        may_validate += len(places) > 2
    wanted = may_validate if num_validation is None else min(num_validation, may_validate)
    assert part.count(VALIDATION) == wanted


def test_recent_events(tmp_path: Path) -> None:
    """With recent_events, a user's older events are not trained on, but are still known."""
    items, times = [0, 1, 2, 3, 4, 0, 3, 2, 2], [6, 5, 4, 3, 2, 1, 1, 2, 3]
    path = write(tmp_path / "e.parquet", u=[1] * 6 + [2] * 3, i=items, t=times)
    dataset = read_dataset(config(path, recent_events=2), seed=0)
    assert by_key(dataset, dataset.train) == {(1, 2), (1, 3), (2, 3)}
    assert len(dataset.history) == 5
    assert len(dataset.known) == 7


GIVEN = {"split": "given", "split_column": "s", "train_value": 0, "test_value": 2, "time": None}


def test_given_split(tmp_path: Path) -> None:
    """The split column decides; all three parts are taken as they are."""
    path = write(tmp_path / "e.parquet", u=[1, 1, 2, 2], i=[1, 2, 1, 2], s=[0, 2, 0, 1])
    dataset = read_dataset(config(path, **GIVEN, validation_value=1), seed=0)
    assert [len(p) for p in (dataset.train, dataset.validation, dataset.test)] == [2, 1, 1]


def test_held_out_validation(tmp_path: Path) -> None:
    """Without validation in the file the seed draws it from training, and every id keeps a training event."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(30, size=500), rng.integers(40, size=500)
    path = write(tmp_path / "e.parquet", u=users, i=items, s=[0] * 450 + [2] * 50)
    one, again, other = (read_dataset(config(path, **GIVEN, num_validation=100), seed=s) for s in (1, 1, 2))
    assert (len(one.train), len(one.validation), len(one.test)) == (350, 100, 50)
    assert sorted(one.users.ids) == sorted(set(users[:450].tolist()))
    assert (one.validation.items_E >= 0).all()
    assert (one.validation.items_E == again.validation.items_E).all()
    assert not np.array_equal(one.users.ids[one.validation.users_E], other.users.ids[other.validation.users_E])


@pytest.mark.parametrize(
    ("columns", "options", "error", "words"),
    [
        ({"i": [1], "t": [1]}, {}, ConfigError, "data.user is 'u'"),
        ({"u": [1], "items": [1], "t": [1]}, {"item": "item"}, ConfigError, "did you mean 'items'"),
        ({"u": [1, None], "i": [1, 2], "t": [1, 2]}, {}, DataError, "column 'u' has 1 nulls, the first in row 1"),
        ({"u": [1, 2], "i": ["a", None], "t": [1, 2]}, {}, DataError, "column 'i' has 1 nulls"),
        ({"u": pl.Series([], dtype=pl.Int64), "i": [], "t": []}, {}, DataError, "no events"),
        ({"u": [1.5], "i": [1], "t": [1]}, {}, DataError, "whole numbers or strings"),
        ({"u": pl.Series([2**63], dtype=pl.UInt64), "i": [1], "t": [1]}, {}, DataError, "signed 64-bit"),
        ({"u": [1], "i": [1], "t": ["noon"]}, {}, DataError, "numbers or dates"),
        ({"u": [1], "i": [1], "t": [float("nan")]}, {}, DataError, "NaN"),
        ({"u": [1, 2], "i": [1, 2], "t": [1, 2]}, {}, DataError, "no validation events"),
        ({"u": [1, 1], "i": [1, 2], "s": [0, 5]}, {**GIVEN, "validation_value": 1}, ConfigError, "holds 5"),
        ({"u": [1, 1], "i": [1, 2], "s": [0, 2]}, {**GIVEN, "validation_value": 1}, ConfigError, "never holds 1"),
        ({"u": [1, 1], "i": [1, 2], "s": [0, 2]}, {**GIVEN, "num_validation": 1}, DataError, "too few"),
    ],
)
def test_unusable_events(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Nulls, no rows, missing columns, wrong types and splits without events are refused with the reason."""
    with pytest.raises(error) as caught:
        read_dataset(config(write(tmp_path / "e.parquet", **columns), **options), seed=0)
    assert words in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file, a file that is not what its suffix says and an unknown suffix are each refused by name."""
    with pytest.raises(DataError, match="no such file"):
        read_dataset(config(tmp_path / "none.csv"), seed=0)
    (tmp_path / "e.parquet").write_text("u,i,t\n1,2,3\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(config(tmp_path / "e.parquet"), seed=0)
    with pytest.raises(ConfigError, match=r"must end in one of \.parquet"):
        read_dataset(config(tmp_path / "e.json"), seed=0)
