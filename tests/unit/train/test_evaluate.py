"""Metrics of full rankings, against a slow definition of each."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embstore.train.data import Pairs
from embstore.train.evaluate import by_popularity, by_vectors, make_targets, measure, rank

CPU = torch.device("cpu")
EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=20)


def pairs(events: list[tuple[int, int]]) -> Pairs:
    array = np.array(events, np.int64).reshape(-1, 2)
    return Pairs(array[:, 0].copy(), array[:, 1].copy())


def brute_force(
    wanted: list[tuple[int, int]], known: list[tuple[int, int]], scores: torch.Tensor, k: int, exclude_seen: bool
) -> tuple[float, float, float]:
    """nDCG, recall and HR by sorting every user's items in plain Python."""
    ndcg, recall, hits, count = 0.0, 0.0, 0.0, 0
    for user in sorted({u for u, _ in wanted}):
        seen = {i for u, i in known if u == user and exclude_seen}
        targets = {i for u, i in wanted if u == user} - seen
        if not targets:
            continue
        count += 1
        if user < 0:
            continue
        order = sorted(set(range(scores.shape[1])) - seen, key=lambda i: -float(scores[user, i]))[:k]
        found = [rank for rank, item in enumerate(order) if item in targets]
        ideal = sum(1 / log2(rank + 2) for rank in range(min(k, len(targets))))
        ndcg += sum(1 / log2(rank + 2) for rank in found) / ideal
        recall += len(found) / len(targets)
        hits += bool(found)
    return ndcg / max(count, 1), recall / max(count, 1), hits / max(count, 1)


@given(EVENTS, EVENTS, st.integers(1, 10), st.booleans(), st.lists(st.integers(-3, -1), max_size=4))
def test_rank_is_the_brute_force_figure(
    wanted: list[tuple[int, int]], known: list[tuple[int, int]], k: int, exclude_seen: bool, unseen: list[int]
) -> None:
    """For any events, with ids that have no row among the targets, the three metrics are the textbook's."""
    wanted = wanted + [(0, row) for row in unseen] + [(row, 1) for row in unseen]
    users, items = torch.randn(5, 3), torch.randn(8, 3)
    targets = make_targets(pairs(wanted), pairs(known), 8, exclude_seen=exclude_seen)
    got = rank(targets, by_vectors(users, items), k, CPU)
    expected = brute_force(wanted, known, users @ items.T, k, exclude_seen)
    assert (got[f"ndcg@{k}"], got[f"recall@{k}"], got[f"hr@{k}"]) == pytest.approx(expected)


def test_known_values() -> None:
    """Targets at places 1 and 3 of three: nDCG by hand, recall 2/3 with one that was not found."""
    got = measure(np.array([[True, False, True]]), np.array([3]))
    assert got["ndcg@3"] == pytest.approx((1 + 1 / log2(4)) / (1 + 1 / log2(3) + 1 / log2(4)))
    assert (got["recall@3"], got["hr@3"]) == (pytest.approx(2 / 3), 1.0)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranking one user at a time gives the same as all at once."""
    rng = np.random.default_rng(0)
    wanted, known = (Pairs(rng.integers(20, size=60), rng.integers(50, size=60)) for _ in range(2))
    targets = make_targets(wanted, known, 50, exclude_seen=True)
    score = by_vectors(torch.randn(20, 4), torch.randn(50, 4))
    whole = rank(targets, score, 5, CPU)
    monkeypatch.setattr("embstore.train.evaluate._MAX_SCORES", 1)
    assert rank(targets, score, 5, CPU) == pytest.approx(whole)


def test_popularity_order() -> None:
    """The popularity baseline orders items by known events, ties by row, and leaves out what the user has."""
    known = pairs([(0, 2), (1, 2), (0, 1), (1, 3), (2, -1)])
    assert by_popularity(known, 5, CPU)(torch.tensor([0]))[0].argsort(descending=True).tolist() == [2, 1, 3, 0, 4]
    targets = make_targets(pairs([(0, 3)]), known, 5, exclude_seen=True)
    assert rank(targets, by_popularity(known, 5, CPU), 1, CPU)["hr@1"] == 1.0
