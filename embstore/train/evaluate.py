"""Exact full ranking: every item is scored for every user, no sampled candidates.

What is left out: with `exclude_seen`, the items of the user's known events (training, and validation when the test is
ranked) are taken out of the ranking, and a target the user already had is not a target; without it nothing is left
out. Targets that have no row (ids unseen in training) cannot be ranked: they stay in the counts, as misses.
"""

# Shapes: U users with targets, N items, K the cutoff, B users of a chunk, T targets.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.train.config import TrainConfig
from embstore.train.data import Dataset, Int64s, Pairs
from embstore.train.model import Factorisation, all_vectors

Metrics = dict[str, float]
_MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class Targets:
    """Who is to be ranked for, what is hoped to be found, what is left out.

    users_U: the users' rows, ascending, all of them at least 0. num_targets_U: how many targets each has, with and
    without a row. pairs_T: `index of the user * num_items + item` of those that have one, ascending. seen_users and
    seen_items: what is left out, ordered by index of the user. num_unranked: users with targets but without a row.
    """

    num_items: int
    users_U: Int64s
    num_targets_U: Int64s
    pairs_T: Int64s
    seen_users: Int64s
    seen_items: Int64s
    num_unranked: int


def make_targets(wanted: Pairs, known: Pairs, num_items: int, *, exclude_seen: bool) -> Targets:
    """The targets among `wanted` events, given the `known` ones (which `exclude_seen` leaves out of the ranking)."""
    users, items = np.unique(np.stack([wanted.users_E, wanted.items_E]), axis=1)
    left_out = (known.users_E >= 0) & (known.items_E >= 0) & exclude_seen
    known_users, known_items = known.users_E[left_out], known.items_E[left_out]
    had = np.isin(users * num_items + items, known_users * num_items + known_items) & (items >= 0)
    users, items = users[~had], items[~had]
    num_unranked = len(np.unique(users[users < 0]))
    users, items = users[users >= 0], items[users >= 0]
    users_U, index, num_targets_U = np.unique(users, return_inverse=True, return_counts=True)
    pairs_T = np.sort(index[items >= 0] * num_items + items[items >= 0])
    place = np.searchsorted(users_U, known_users)
    ours = np.flatnonzero(np.append(users_U, -1)[place] == known_users)
    ours = ours[np.argsort(place[ours], kind="stable")]
    return Targets(num_items, users_U, num_targets_U, pairs_T, place[ours], known_items[ours], num_unranked)


@torch.no_grad()
def rank(targets: Targets, score: Callable[[Tensor], Tensor], cutoff: int, device: torch.device) -> Metrics:
    """nDCG@k, recall@k and HR@k, each the mean over users; `score` gives [B, num_items] for users' rows [B]."""
    gains_UK = np.zeros((len(targets.users_U), cutoff), bool)
    chunk = max(1, _MAX_SCORES // targets.num_items)
    for start in range(0, len(targets.users_U), chunk):
        users_B = torch.from_numpy(targets.users_U[start : start + chunk]).to(device)
        scores_BN = score(users_B)
        low, high = np.searchsorted(targets.seen_users, [start, start + chunk])
        rows = torch.from_numpy(targets.seen_users[low:high] - start).to(device)
        scores_BN[rows, torch.from_numpy(targets.seen_items[low:high]).to(device)] = -torch.inf
        top_BK = scores_BN.topk(min(cutoff, targets.num_items), dim=1).indices.cpu().numpy()
        pairs_BK = (start + np.arange(len(top_BK)))[:, None] * targets.num_items + top_BK
        gains_UK[start : start + chunk, : top_BK.shape[1]] = _among(pairs_BK, targets.pairs_T)
    return measure(gains_UK, targets.num_targets_U, targets.num_unranked)


class Judge:
    """Ranks for one part of a data set: the tables of a model, and the popularity baseline, by the same protocol."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, wanted: Pairs, known: Pairs, device: torch.device
    ) -> None:
        self.cutoff, self.device, self.known = config.evaluation.cutoff, device, known
        self.targets = make_targets(wanted, known, len(dataset.items), exclude_seen=config.data.exclude_seen)

    def metrics(self, model: Factorisation) -> Metrics:
        """The metrics of a model, by the vectors that its tables would serve now."""
        score = by_vectors(all_vectors(model.user, self.device), all_vectors(model.item, self.device))
        return rank(self.targets, score, self.cutoff, self.device)

    def ndcg(self, model: Factorisation) -> float:
        """Just the nDCG."""
        return self.metrics(model)[f"ndcg@{self.cutoff}"]

    def popularity(self) -> Metrics:
        """The metrics of the popularity baseline."""
        score = by_popularity(self.known, self.targets.num_items, self.device)
        return rank(self.targets, score, self.cutoff, self.device)


def measure(gains_UK: NDArray[np.bool_], num_targets_U: Int64s, num_unranked: int = 0) -> Metrics:
    """The metrics of ranked lists: gains_UK[u, i] says whether place i of user u holds one of the user's targets."""
    cutoff = gains_UK.shape[1]
    discounts_K = 1 / np.log2(np.arange(2, cutoff + 2))
    ideal_K = np.cumsum(discounts_K)
    num_users = max(len(gains_UK) + num_unranked, 1)
    ndcg_U = gains_UK @ discounts_K / ideal_K[np.minimum(num_targets_U, cutoff) - 1]
    return {
        f"ndcg@{cutoff}": float(ndcg_U.sum() / num_users),
        f"recall@{cutoff}": float((gains_UK.sum(axis=1) / num_targets_U).sum() / num_users),
        f"hr@{cutoff}": float(gains_UK.any(axis=1).sum() / num_users),
    }


def by_vectors(users_ND: Tensor, items_ND: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores of a factorisation: dot products."""
    return lambda users_B: users_ND[users_B] @ items_ND.T


def by_popularity(known: Pairs, num_items: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Scores of the popularity baseline: items by falling number of known events, ties by row, for everybody."""
    counts_N = np.bincount(known.items_E[known.items_E >= 0], minlength=num_items)
    places_N = np.empty(num_items, np.float32)
    places_N[np.argsort(-counts_N, kind="stable")] = -np.arange(num_items)
    scores_N = torch.from_numpy(places_N).to(device)
    return lambda users_B: scores_N.repeat(len(users_B), 1)


def _among(values: Int64s, ordered: Int64s) -> NDArray[np.bool_]:
    """Which of the values are in an ascending array."""
    if not len(ordered):
        return np.zeros(values.shape, bool)
    found: NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found
