"""What a run leaves behind: the publications for the store, the result for programs, the words for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from embstore.ids import Vocabulary
from embstore.publish.publication import Publication
from embstore.schemes.base import Scheme
from embstore.train.config import TrainConfig
from embstore.train.data import Dataset
from embstore.train.evaluate import Metrics
from embstore.train.loop import FitResult
from embstore.train.model import Factorisation


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table of the release: what it is and what it takes; ratio: bytes of the plain float32 table over its own."""

    version: int
    scheme: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    num_bytes: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run made and how good it is; `metrics` and `popularity` are of the test events, by one protocol."""

    release: str
    tables: dict[str, PublishedTable]
    metrics: Metrics
    popularity: Metrics
    fit: FitResult
    num_train_events: int
    num_test_events: int
    seconds: float
    device: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self)


def to_publish(
    model: Factorisation, dataset: Dataset, figures: Mapping[str, float | int | str], config: TrainConfig
) -> dict[str, Publication]:
    """Both tables with their ids, hot ids and the run's figures."""
    dtypes = {"user": config.tables.user.dtype, "item": config.tables.item.dtype}
    ids = {"user": dataset.users, "item": dataset.items}
    return {
        name: Publication(
            table.cpu(),
            ids=Vocabulary.from_ids(ids[name].ids),
            hot_ids=ids[name].ids[: config.publish.num_hot_ids],
            metrics={
                **figures,
                "num_train_events": len(dataset.train),
                "compression_ratio": ratio(table, dtypes[name]),
            },
            dtype=dtypes[name],
            new_id_type=config.publish.new_id_type,
        )
        for name, table in model.tables().items()
    }


def published_table(table: Scheme, version: int, dtype: str) -> PublishedTable:
    """The description of a table that was published as this version."""
    return PublishedTable(
        version=version,
        scheme=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        dtype=dtype,
        num_bytes=table.num_bytes(dtype),
        ratio=ratio(table, dtype),
    )


def ratio(table: Scheme, dtype: str = "float32") -> float:
    """Bytes of the plain float32 table over the bytes of this one with rows of `dtype`."""
    return table.num_embeddings * table.embedding_dim * 4 / table.num_bytes(dtype)


def describe_data(dataset: Dataset) -> str:
    """The data set in a line."""
    return (
        f"{len(dataset.train):,} training, {len(dataset.validation):,} validation and {len(dataset.test):,} test "
        f"events of {len(dataset.users):,} users and {len(dataset.items):,} items"
    )


def describe_model(model: Factorisation) -> str:
    """The tables in a line."""
    return ", ".join(
        f"{name} {table.name} {table.num_bytes():,} bytes ({ratio(table):.1f}x)"
        for name, table in model.tables().items()
    )


def describe_metrics(metrics: Metrics) -> str:
    """Metrics in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
