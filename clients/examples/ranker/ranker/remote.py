"""Vectors from the embedding service: one call for both tables, of the pinned release, within the deadline.

Whatever goes wrong there, a ranking gets vectors: the default ones, and the reason.
"""

# Shapes: C candidates, D embedding_dim.

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from embstore_client import (
    AsyncEmbeddingClient,
    ConnectionFailed,
    DeadlineExceeded,
    EmbstoreError,
    ManyRows,
    NotFound,
    Overloaded,
    Rows,
    Timeout,
    Unavailable,
)
from torch import Tensor

from ranker.artifact import Artifact, Key, Side
from ranker.settings import Settings

REASONS: dict[type[EmbstoreError], str] = {
    Timeout: "timeout",
    DeadlineExceeded: "timeout",
    ConnectionFailed: "unreachable",
    NotFound: "release_not_served",
    Overloaded: "overloaded",
    Unavailable: "unavailable",
}
OTHER, SKEWED, UNCHECKED = "failed", "other_vectors", "not_checked_yet"
ALL_REASONS = (*dict.fromkeys(REASONS.values()), OTHER, SKEWED, UNCHECKED)
PROBE_TIMEOUT_S = 1.0
TOLERANCE = 1e-4
"""How far a golden vector may be off: a GPU composes some schemes with other roundings."""


@dataclass(frozen=True)
class Vectors:
    """What a ranking goes by. degraded: why these are default vectors, None where they are not.

    num_unknown: ids of each side that the release does not have; they have default vectors too.
    """

    user_D: Tensor
    items_CD: Tensor
    degraded: str | None = None
    unknown_user: bool = False
    num_unknown_items: int = 0


class Remote:
    """The embedding service, as far as one ranker is concerned.

    problem: why the pinned release cannot be relied on, None when it was seen served. A service that was there and
    does not answer is no such problem: rankings then do without, and every other replica would fare the same.
    """

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self.release, self.user, self.item = artifact.release, artifact.user, artifact.item
        self.url, self.probe_seconds = settings.embeddings, settings.probe_seconds
        self.client = _make_client(settings)
        self.problem: str | None = f"release {self.release} was not yet seen at {self.url}"
        self._seen = self._skewed = False
        self._unseen = UNCHECKED

    async def vectors(self, user: Key, items: Sequence[Key]) -> Vectors:
        """The vectors of a user and of candidates, in order; never an error of the embedding service."""
        if self._skewed:
            return self.defaults(len(items), SKEWED)
        if not self._seen:  # its vectors were not yet compared with those of training
            return self.defaults(len(items), self._unseen)
        try:
            many = await self._lookup([user], items)
        except EmbstoreError as error:
            return self.defaults(len(items), reason_of(error))
        users, found = many[self.user.table], many[self.item.table]
        if not (_may_be(users, self.user) and _may_be(found, self.item)):
            return self.defaults(len(items), SKEWED)
        return Vectors(
            _with_default(users, self.user)[0],
            _with_default(found, self.item),
            unknown_user=users.missing > 0,
            num_unknown_items=found.missing,
        )

    def defaults(self, num_items: int, reason: str) -> Vectors:
        """Default vectors for everybody: all candidates then score the same, and keep the caller's order."""
        return Vectors(self.user.default_D, self.item.default_D.expand(num_items, -1), degraded=reason)

    async def watch(self) -> None:
        """Look after the release until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(self.probe_seconds)

    async def probe(self) -> None:
        """Look whether the pinned release is served, and whether its vectors are those of training."""
        try:
            many = await self._lookup(self.user.golden, self.item.golden, PROBE_TIMEOUT_S)
        except NotFound as error:
            self.problem = f"release {self.release} is not served by {self.url}: {error}"
            self._unseen = reason_of(error)
            return
        except EmbstoreError as error:
            if not self._seen:
                self.problem = f"release {self.release} was not yet seen at {self.url}: {error}"
                self._unseen = reason_of(error)
            return
        wrong = [side.table for side in (self.user, self.item) if not _same(many[side.table], side)]
        self._skewed = bool(wrong)
        self._seen = not wrong
        self.problem = (
            f"release {self.release} of {self.url} has other vectors in {' and '.join(wrong)} than this ranker was "
            "trained with: train it again, or serve the store that it was trained from"
            if wrong
            else None
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def _lookup(self, users: Sequence[Key], items: Sequence[Key], timeout_s: float | None = None) -> ManyRows:
        asked = {self.user.table: _ids(users, self.user), self.item.table: _ids(items, self.item)}
        return await self.client.lookup_many(asked, release=self.release, timeout_s=timeout_s)


def _make_client(settings: Settings) -> AsyncEmbeddingClient:
    """The client, all its options in one place."""
    return AsyncEmbeddingClient(
        settings.embeddings.split(","),
        timeout_s=settings.deadline_ms / 1000,
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
    )


def reason_of(error: EmbstoreError) -> str:
    """The label of an error, one of ALL_REASONS."""
    return next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), OTHER)


def _ids(keys: Sequence[Key], side: Side) -> list[int] | list[str] | np.ndarray:
    """Keys as the client takes them."""
    return np.array(keys, np.int64) if side.keys == "int64" else [str(key) for key in keys]


def _with_default(rows: Rows, side: Side) -> Tensor:
    """The vectors, the side's default one where an id was not found."""
    vectors = np.where(rows.found[:, None], rows.vectors, side.default_D.numpy())
    return torch.from_numpy(vectors.astype(np.float32, copy=False))


def _may_be(rows: Rows, side: Side) -> bool:
    """Whether rows can be of the version that the ranker was trained with: a store made anew counts from 1 again."""
    return rows.vectors.shape[1] == len(side.default_D) and rows.version == side.version


def _same(rows: Rows, side: Side) -> bool:
    """Whether the golden ids have the vectors that they had in training."""
    expected = side.golden_GD.numpy()
    return rows.vectors.shape == expected.shape and bool(
        np.allclose(rows.vectors, expected, rtol=TOLERANCE, atol=TOLERANCE)
    )
