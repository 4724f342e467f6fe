"""Lists of candidates for users with events that were held back, and how well a ranker orders them.

The candidates of a user are what a retrieval stage would give: the items with the highest dot products among those
that the user does not have. A target that is not among them is a miss. The measure is the trainer's own.
"""

# Shapes: U users, N items, C candidates, K the cutoff, E events.

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from embstore.train.data import Pairs, TableIds
from embstore.train.evaluate import Metrics, make_targets, measure
from ranker.artifact import Key

K = TypeVar("K", int, Key)


@dataclass(frozen=True)
class CandidateList(Generic[K]):
    """What a request would hold, and what is hoped for.

    K: int where ids are rows of the tables, Key where they are what the wire has.
    num_targets: targets with and without a row. targets: those with one.
    """

    user: K
    candidates: list[K]
    targets: list[K]
    num_targets: int


@torch.inference_mode()
def retrieve(
    users_ND: Tensor, items_ND: Tensor, wanted: Pairs, known: Pairs, *, exclude_seen: bool, size: int, at_most: int
) -> list[CandidateList[int]]:
    """Lists of rows for users whom training knows and who have `wanted` events, `at_most` so many, evenly spread.

    exclude_seen: items of a user's `known` events are no candidates of theirs.
    """
    num_items = len(items_ND)
    chosen = np.unique(wanted.users_E[wanted.users_E >= 0])
    chosen = chosen[:: max(1, -(-len(chosen) // at_most))]
    targets = make_targets(_of(chosen, wanted), _of(chosen, known), num_items, exclude_seen=exclude_seen)
    lists = []
    for place, user in enumerate(targets.users_U.tolist()):
        scores_N = items_ND @ users_ND[user]
        low, high = np.searchsorted(targets.seen_users, [place, place + 1])
        scores_N[torch.from_numpy(targets.seen_items[low:high])] = -torch.inf
        best_C = scores_N.topk(min(size, num_items))
        low, high = np.searchsorted(targets.pairs_T, [place * num_items, (place + 1) * num_items])
        lists.append(
            CandidateList(
                user,
                best_C.indices[best_C.values > -torch.inf].tolist(),
                (targets.pairs_T[low:high] - place * num_items).tolist(),
                int(targets.num_targets_U[place]),
            )
        )
    return lists


def evaluate(
    lists: Sequence[CandidateList[K]], best: Callable[[CandidateList[K]], Sequence[K]], cutoff: int
) -> Metrics:
    """The mean metrics over the lists; `best` gives a list's candidates, best first, `cutoff` of them or more."""
    gains_UK = np.zeros((len(lists), cutoff), bool)
    for gains_K, one in zip(gains_UK, lists, strict=True):
        hoped = set(one.targets)
        found = [item in hoped for item in best(one)[:cutoff]]
        gains_K[: len(found)] = found
    return measure(gains_UK, np.array([one.num_targets for one in lists]))


def write_lists(path: Path, lists: Iterable[CandidateList[Key]]) -> None:
    """One list a line, as JSON."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in lists), "utf-8")


def read_lists(path: Path) -> list[CandidateList[Key]]:
    """The lists that `write_lists` wrote."""
    return [CandidateList(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def with_keys(one: CandidateList[int], users: TableIds, items: TableIds) -> CandidateList[Key]:
    """A list of rows as one of keys."""
    candidates, targets = ([key_of(items, row) for row in rows] for rows in (one.candidates, one.targets))
    return CandidateList(key_of(users, one.user), candidates, targets, one.num_targets)


def key_of(ids: TableIds, row: int) -> Key:
    """The key of a row, as JSON has it."""
    key = ids.ids[row]
    return key if isinstance(key, str) else int(key)


def _of(users: np.ndarray, events: Pairs) -> Pairs:
    """The events of these users."""
    theirs = np.isin(events.users_E, users)
    return Pairs(events.users_E[theirs], events.items_E[theirs])
