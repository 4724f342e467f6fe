"""A training config: TOML in, frozen structs out, and a clear refusal of everything else.

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

Unknown keys, wrong types and impossible values are ConfigErrors that name the file and the key.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from embstore.common.config import build, expand, read_toml
from embstore.common.sizes import parse_bytes
from embstore.errors import ConfigError
from embstore.store.manifest import Dtype

Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
NotNegative = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
AtLeastOne = Annotated[int, Meta(ge=1)]


class DataConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    split: Literal["leave_last_out", "given"] = "leave_last_out"
    split_column: str | None = None
    train_value: int | str | None = None
    validation_value: int | str | None = None
    test_value: int | str | None = None
    num_validation: AtLeastOne | None = None
    recent_events: AtLeastOne | None = None
    exclude_seen: bool = True

    def __post_init__(self) -> None:
        given = ("split_column", "train_value", "test_value")
        missing = [name for name in given if getattr(self, name) is None]
        if self.split == "given" and missing:
            raise ValueError(f"split = 'given' needs {missing[0]}")
        if self.split == "given" and self.validation_value is None and self.num_validation is None:
            raise ValueError("split = 'given' needs validation_value or num_validation")
        if self.split == "leave_last_out" and len(missing) < len(given):
            raise ValueError("split_column, train_value and test_value belong to split = 'given'")
        if self.time is None and (self.split == "leave_last_out" or self.recent_events is not None):
            raise ValueError("leave_last_out and recent_events need time, the column to order events by")


class TableConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one table is stored: a scheme, and its size as a `ratio`, a `budget` or the scheme's own options.

    dtype: how rows are published, float32 unless said otherwise. Training is in float32, and so are ratio and budget:
    int8 rows make a table of ratio 8 about 28 times smaller than the plain one.
    """

    scheme: str = "full"
    ratio: Annotated[float, Meta(ge=1)] | None = None
    budget: int | str | None = None
    dtype: Dtype = "float32"
    options: Mapping[str, Any] = {}

    def __post_init__(self) -> None:
        if self.ratio is not None and self.budget is not None:
            raise ValueError("a table takes ratio or budget, not both")
        if self.budget is not None:
            try:
                parse_bytes(self.budget)
            except ConfigError as error:
                raise ValueError(str(error)) from error

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int | None:
        """The bytes that the table may take; None when the scheme's own options say its size."""
        if self.budget is not None:
            return parse_bytes(self.budget)
        return None if self.ratio is None else int(num_embeddings * embedding_dim * 4 / self.ratio)


class TablesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The two tables, under the names they are published by."""

    user: TableConfig = TableConfig()
    item: TableConfig = TableConfig()


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """embedding_dim: floats in a vector; init_std: their standard deviation at the start (None: dim ** -0.5)."""

    embedding_dim: AtLeastOne = 64
    init_std: Positive | None = None


class TrainingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """batch_size: examples a step, whose items are each other's negatives; l2: on the batch's vectors.

    learning_rate: of tables (row-wise Adagrad); network_learning_rate: of the layers and projections that some
    schemes have (Adam).

    Training stops when the validation nDCG has not grown for `patience` evaluations, one every `evaluate_every`
    epochs, or after `max_epochs`; the best epoch's tables are the ones published.
    """

    batch_size: Annotated[int, Meta(ge=2)] = 2048
    learning_rate: Positive = 0.1
    network_learning_rate: Positive = 0.001
    l2: NotNegative = 0.1
    max_epochs: AtLeastOne = 30
    patience: AtLeastOne = 2
    evaluate_every: AtLeastOne = 1


class EvaluationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """cutoff: the k of nDCG@k, recall@k and HR@k."""

    cutoff: AtLeastOne = 10


class PublishConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """label: what is pointed at the new versions; num_hot_ids: the most frequent ids that manifests name; new_id_type:
    whether the label may go from strings to integers or back, which its callers must know of."""

    label: str = "latest"
    num_hot_ids: Annotated[int, Meta(ge=0)] = 4096
    new_id_type: bool = False


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a training run depends on, apart from the device."""

    data: DataConfig
    task: Literal["ranking"] = "ranking"
    seed: Annotated[int, Meta(ge=0)] = 0
    model: ModelConfig = ModelConfig()
    tables: TablesConfig = TablesConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    publish: PublishConfig = PublishConfig()


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply `section.key=value` overrides; a relative data path is relative to the file."""
    path = Path(path)
    raw = read_toml(path, overrides)
    if isinstance(data := raw.get("data"), dict) and isinstance(data.get("path"), str):
        data["path"] = str(path.parent / expand(data["path"], "data.path"))
    if isinstance(tables := raw.get("tables"), dict):
        raw["tables"] = {name: _with_options(table) for name, table in tables.items()}
    return build(TrainConfig, raw, path)


def _with_options(table: Any) -> Any:
    """A table's section with all keys that are the scheme's own under `options`."""
    if not isinstance(table, dict):
        return table
    own = {name: table[name] for name in ("scheme", "ratio", "budget", "dtype") if name in table}
    return own | {"options": {name: value for name, value in table.items() if name not in own}}
