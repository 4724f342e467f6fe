"""What a compression is asked to do, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from embstore.common.sizes import parse_bytes
from embstore.compress.measure import Measured, Quality
from embstore.errors import ConfigError
from embstore.quantize import check_dtype
from embstore.schemes import scheme_class
from embstore.store.local import LATEST, check_label, check_name

METRICS = (
    "vectors",
    "scheme",
    "dtype",
    "num_embeddings",
    "embedding_dim",
    "budget_bytes",
    "num_bytes",
    "full_bytes",
    "ratio",
    "id_space_bytes",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compress, into what, and where to.

    budget, ratio: bytes of the published tensors ("64MB"), or how many times smaller than float32 they are; one of
    them. dtype: how rows are stored. options: the scheme's own. tensor: the one to take of a file that holds several.
    table: the name to publish under; None: only report. label: what is pointed at the version; None: nothing.
    new_id_type: the label may move from string ids to integers, or back.
    keep_order: rows stay where they are; otherwise counts put the most frequent first, where a scheme shares least.
    """

    vectors: Path
    scheme: str
    budget: int | str | None = None
    ratio: float | None = None
    counts: Path | None = None
    tensor: str | None = None
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_order: bool = False
    seed: int = 0
    table: str | None = None
    label: str | None = LATEST
    new_id_type: bool = False

    def __post_init__(self) -> None:
        scheme_class(self.scheme)
        check_dtype(self.dtype)
        if (self.budget is None) == (self.ratio is None):
            raise ConfigError("give the size as a budget or as a ratio, exactly one of them")
        if self.budget is not None:
            parse_bytes(self.budget)
        if self.ratio is not None and not 1 <= self.ratio < float("inf"):
            raise ConfigError(f"ratio must be at least 1 (1 = uncompressed), got {self.ratio}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.table is not None:
            check_name("table", self.table)
            if self.label is not None:
                check_label(self.label)

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """The bytes that the published tensors may take."""
        if self.budget is not None:
            return parse_bytes(self.budget)
        assert self.ratio is not None
        return int(num_embeddings * embedding_dim * 4 / self.ratio)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a compression made: its size, how good it is, and where it was published.

    num_bytes: of the published tensors; ratio: the float32 table's over these. id_space_bytes: of the ids beside them.
    embedding_dim_before: of the version that the label pointed at before; None where there was none.
    """

    vectors: str
    scheme: str
    parameters: dict[str, Any]
    dtype: str
    num_embeddings: int
    embedding_dim: int
    budget_bytes: int
    num_bytes: int
    full_bytes: int
    ratio: float
    id_space_bytes: int
    measured: Measured
    seed: int
    seconds: float = 0.0
    table: str | None = None
    version: int | None = None
    label: str | None = None
    embedding_dim_before: int | None = None

    @property
    def quality(self) -> Quality:
        """The figures of what was measured."""
        return self.measured.quality

    def metrics(self) -> dict[str, Any]:
        """What a manifest keeps of it: sizes and quality; the scheme's parameters it has anyway."""
        return {name: getattr(self, name) for name in METRICS} | asdict(self.quality)

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, without what was measured of each id."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "measured"}
        return values | {"quality": asdict(self.quality)}
