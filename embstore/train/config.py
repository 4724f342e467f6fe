"""A training config: TOML in, frozen dataclasses out, and a clear refusal of everything else.

    task = "ranking"                                  # the user's next items, among all of them
    seed = 0

    [data]
    path = "${EMBSTORE_DATA}/gowalla/interactions.parquet"
    user = "user_id"
    item = "item_id"
    split = "given"                                   # or "leave_last_out", by `time`
    split_column = "split"
    train_value = 0
    test_value = 1
    num_validation = 10_000

    [tables.user]                                     # no scheme: full
    [tables.item]
    scheme = "memcom"
    ratio = 16                                        # or budget = "4MB", or num_buckets = 1000

Unknown keys, wrong types and impossible values are ConfigErrors that name the key.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embstore.common.sizes import parse_bytes as parse_bytes
from embstore.errors import ConfigError
from embstore.store.manifest import DTYPES
from embstore.train.toml_fields import build, one_of, positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the events are, what their columns are called, which of them are held back.

    split `leave_last_out`: by `time`, each user's last event is the test, the one before it validation.
    split `given`: `split_column` holds `train_value`, `test_value` and perhaps `validation_value`; without the last,
    `num_validation` training events, drawn by the seed, are held out for early stopping.
    num_validation: with `leave_last_out`, how many users (drawn by the seed) give an event; None: all of them.
    recent_events: train on no more than this many of each user's last events; needs `time`.
    exclude_seen: an item that the user already has is neither recommended nor counted as a target.
    """

    path: str
    user: str
    item: str
    time: str | None = None
    split: str = "leave_last_out"
    split_column: str | None = None
    train_value: int | str | None = None
    validation_value: int | str | None = None
    test_value: int | str | None = None
    num_validation: int | None = None
    recent_events: int | None = None
    exclude_seen: bool = True

    def __post_init__(self) -> None:
        one_of("data.split", self.split, ("leave_last_out", "given"))
        positive(self, "data", "num_validation", "recent_events")
        given = ("split_column", "train_value", "test_value")
        missing = [name for name in given if getattr(self, name) is None]
        if self.split == "given" and missing:
            raise ConfigError(f"data.split = 'given' needs data.{missing[0]}")
        if self.split == "given" and self.validation_value is None and self.num_validation is None:
            raise ConfigError("data.split = 'given' needs data.validation_value or data.num_validation")
        if self.split == "leave_last_out" and len(missing) < len(given):
            raise ConfigError("data.split_column, train_value and test_value belong to data.split = 'given'")
        if self.time is None and (self.split == "leave_last_out" or self.recent_events is not None):
            raise ConfigError("leave_last_out and recent_events need data.time, the column to order events by")


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How one table is stored: a scheme, and its size as a `ratio`, a `budget` or the scheme's own options.

    dtype: how rows are published, float32 unless said otherwise. Training is in float32, and so are ratio and budget:
    int8 rows make a table of ratio 8 about 28 times smaller than the plain one.
    """

    scheme: str = "full"
    ratio: float | None = None
    budget: int | str | None = None
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ratio is not None and self.budget is not None:
            raise ConfigError("a table takes ratio or budget, not both")
        one_of("dtype", self.dtype, DTYPES)
        if self.ratio is not None and not self.ratio >= 1:
            raise ConfigError(f"ratio must be at least 1 (1 = uncompressed), got {self.ratio}")
        if self.budget is not None:
            parse_bytes(self.budget)

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int | None:
        """The bytes that the table may take; None when the scheme's own options say its size."""
        if self.budget is not None:
            return parse_bytes(self.budget)
        return None if self.ratio is None else int(num_embeddings * embedding_dim * 4 / self.ratio)


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """The two tables, under the names they are published by."""

    user: TableConfig = field(default_factory=TableConfig)
    item: TableConfig = field(default_factory=TableConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """embedding_dim: floats in a vector; init_std: their standard deviation at the start (None: dim ** -0.5)."""

    embedding_dim: int = 64
    init_std: float | None = None

    def __post_init__(self) -> None:
        positive(self, "model", "embedding_dim", "init_std")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """batch_size: examples a step, whose items are each other's negatives; l2: on the batch's vectors.

    learning_rate: of tables (row-wise Adagrad); network_learning_rate: of the layers and projections that some
    schemes have (Adam).

    Training stops when the validation nDCG has not grown for `patience` evaluations, one every `evaluate_every`
    epochs, or after `max_epochs`; the best epoch's tables are the ones published.
    """

    batch_size: int = 2048
    learning_rate: float = 0.1
    network_learning_rate: float = 0.001
    l2: float = 0.1
    max_epochs: int = 30
    patience: int = 2
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        rates = ("learning_rate", "network_learning_rate")
        positive(self, "training", *rates, "max_epochs", "patience", "evaluate_every")
        if self.batch_size < 2:
            raise ConfigError(f"training.batch_size must be at least 2, got {self.batch_size}")
        if not 0 <= self.l2 < float("inf"):
            raise ConfigError(f"training.l2 must be at least 0, got {self.l2}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """cutoff: the k of nDCG@k, recall@k and HR@k."""

    cutoff: int = 10

    def __post_init__(self) -> None:
        positive(self, "evaluation", "cutoff")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """label: what is pointed at the new versions; num_hot_ids: the most frequent ids that manifests name; new_id_type:
    whether the label may go from strings to integers or back, which its callers must know of."""

    label: str = "latest"
    num_hot_ids: int = 4096
    new_id_type: bool = False

    def __post_init__(self) -> None:
        if self.num_hot_ids < 0:
            raise ConfigError(f"publish.num_hot_ids must be at least 0, got {self.num_hot_ids}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on, apart from the device."""

    data: DataConfig
    task: str = "ranking"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        one_of("task", self.task, ("ranking",))
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply `section.key=value` overrides; a relative data path is relative to the file."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    if isinstance(data := raw.get("data"), dict) and isinstance(data.get("path"), str):
        data["path"] = str(path.parent / _expand(data["path"]))
    return build(TrainConfig, raw)


def _expand(path: str) -> str:
    """Replace ${NAME} by the environment's value; ConfigError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ConfigError(f"data.path is {path!r}, but the environment variable {match[1]} is not set")
        return found

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, path))


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; the value is TOML, or a plain string where it is not."""
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key or not all(sections):
        raise ConfigError(f"an override is section.key=value, as training.max_epochs=5, got {override!r}")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"cannot set {name.strip()}: {section} is not a section")
    try:
        raw[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raw[key] = text.strip()
