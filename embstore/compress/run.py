"""Compress a table: read, fit, measure, publish, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from embstore.common.progress import Silent
from embstore.common.sizes import parse_bytes
from embstore.compress.fit import fit_within, served
from embstore.compress.inputs import Source, read_source
from embstore.compress.measure import Quality, measure
from embstore.errors import ConfigError
from embstore.ids import Dense, Vocabulary
from embstore.publish.store import Store
from embstore.quantize import check_dtype
from embstore.schemes import scheme_class
from embstore.store.local import LATEST, check_label, check_name
from embstore.store.manifest import Manifest

NUM_HOT_IDS = 4096


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
    html: Path | None = None

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
    quality: Quality
    seconds: float
    seed: int
    table: str | None = None
    version: int | None = None
    label: str | None = None
    embedding_dim_before: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self)


def compress(job: Job, *, store: Store | None = None, report: Silent | None = None) -> Result:
    """Fit, measure and report; with a table in the job also publish it to the store, after all else has succeeded."""
    started = time.perf_counter()
    report = report or Silent()
    _check_places(job, store)
    source = _read(job, report)
    ids = None if source.ids is None else Vocabulary.from_ids(source.ids)
    full_bytes, budget = 4 * len(source) * source.dim, job.num_bytes(len(source), source.dim)
    if budget > full_bytes:
        raise ConfigError(
            f"a budget of {budget:,} bytes is more than the whole table takes uncompressed: {full_bytes:,} bytes, "
            f"{len(source):,} vectors of {source.dim} float32"
        )
    before = _before(job, store, ids)

    report.note(f"fitting {job.scheme}, {job.dtype} rows, to {budget:,} bytes (of {full_bytes:,})")
    module = fit_within(
        scheme_class(job.scheme),
        torch.from_numpy(source.vectors_ND),
        budget,
        dtype=job.dtype,
        weights_N=None if source.counts_N is None else torch.from_numpy(source.counts_N),
        options=job.options,
        seed=job.seed,
        progress=report.advanced,
    )
    config, num_bytes = module.export()[0], module.num_bytes(job.dtype)
    report.note(f"measuring {num_bytes:,} bytes, {full_bytes / num_bytes:.1f}x")
    measured = measure(source.vectors_ND, served(module, job.dtype), counts_N=source.counts_N, seed=job.seed)

    figures: dict[str, Any] = {
        "vectors": job.vectors.name,
        "scheme": job.scheme,
        "parameters": config.parameters(),
        "dtype": job.dtype,
        "num_embeddings": len(source),
        "embedding_dim": source.dim,
        "budget_bytes": budget,
        "num_bytes": num_bytes,
        "full_bytes": full_bytes,
        "ratio": full_bytes / num_bytes,
        "id_space_bytes": 0 if ids is None else ids.num_bytes(),
        "seed": job.seed,
    }
    version = None
    if job.table is not None and store is not None:
        kept = {name: value for name, value in figures.items() if name != "parameters"}  # the manifest has them
        version = store.publish(
            job.table,
            module,
            label=job.label,
            dtype=job.dtype,
            ids=ids,
            hot_ids=source.hottest(NUM_HOT_IDS),
            new_id_type=job.new_id_type,
            metrics={"compression": kept | asdict(measured.quality)},
        )
        report.note(f"published {job.table} version {version}")
    result = Result(
        **figures,
        quality=measured.quality,
        seconds=time.perf_counter() - started,
        table=job.table,
        version=version,
        label=None if version is None else job.label,
        embedding_dim_before=None if before is None else before.embedding_dim,
    )
    if job.html is not None:
        from embstore.compress.page import write_page

        write_page(job.html, result, measured)
        report.note(f"report written to {job.html}")
    return result


def _check_places(job: Job, store: Store | None) -> None:
    """What would only be found wanting at the end is asked for at the start."""
    if job.table is not None:
        if store is None:
            raise ConfigError(f"publishing table {job.table!r} needs a store")
        store.check_writable()
    if job.html is not None:
        from embstore.compress.page import check_page

        check_page(job.html)


def _before(job: Job, store: Store | None, ids: Vocabulary | None) -> Manifest | None:
    """What the label points at now, if it is to move; Conflict when it must not move to these ids."""
    if job.table is None or job.label is None or store is None:
        return None
    if not job.new_id_type:
        store.check_id_type(job.table, job.label, Dense.kind if ids is None else ids.kind)
    return store.labelled(job.table, job.label)


def _read(job: Job, report: Silent) -> Source:
    """The source, its rows by falling count where that is to be."""
    source = read_source(job.vectors, counts=job.counts, tensor=job.tensor)
    counted = "" if source.counts_N is None else f", {int((source.counts_N > 0).sum()):,} of them with a count"
    report.note(f"read {len(source):,} vectors of {source.dim} dimensions{counted}")
    # Ids in a vocabulary cost the same in any order; plain row numbers only give way to one where the scheme gains.
    renumbers = source.ids is not None or scheme_class(job.scheme).by_rank
    if source.falls or job.keep_order or not renumbers:
        return source
    if source.ids is None:
        report.note("rows are renumbered by falling count; the table keeps its ids, 14 bytes each")
    return source.by_count()
