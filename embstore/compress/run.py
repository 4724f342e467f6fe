"""Compress a table: read, fit, measure, publish, report."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from embstore.common.progress import Silent
from embstore.compress.fit import fit_within, served
from embstore.compress.inputs import Source, read_source
from embstore.compress.measure import measure
from embstore.compress.result import Job, Result
from embstore.errors import ConfigError
from embstore.ids import Dense, Vocabulary
from embstore.publish.store import Store
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme
from embstore.store.manifest import Manifest

NUM_HOT_IDS = 4096


def compress(job: Job, *, store: Store | None = None, report: Silent | None = None) -> Result:
    """Fit, measure and report; with a table in the job also publish it to the store, after all else has succeeded."""
    started, report = time.perf_counter(), report or Silent()
    _check_store(job, store)
    source = _read(job, report)
    ids = None if source.ids is None else Vocabulary.from_ids(source.ids)
    full_bytes, budget = 4 * len(source) * source.dim, _budget(job, source)
    before = _before(job, store, ids)

    report.note(f"fitting {job.scheme}, {job.dtype} rows, to {budget:,} bytes (of {full_bytes:,})")
    module = _fit(job, source, budget, report)
    num_bytes = module.num_bytes(job.dtype)
    report.note(f"measuring {num_bytes:,} bytes, {full_bytes / num_bytes:.1f}x")
    measured = measure(source.vectors_ND, served(module, job.dtype), counts_N=source.counts_N, seed=job.seed)

    result = Result(
        vectors=job.vectors.name,
        scheme=job.scheme,
        parameters=module.export()[0].parameters(),
        dtype=job.dtype,
        num_embeddings=len(source),
        embedding_dim=source.dim,
        budget_bytes=budget,
        num_bytes=num_bytes,
        full_bytes=full_bytes,
        ratio=full_bytes / num_bytes,
        id_space_bytes=0 if ids is None else ids.num_bytes(),
        seed=job.seed,
        measured=measured,
        table=job.table,
        embedding_dim_before=None if before is None else before.embedding_dim,
    )
    if job.table is not None and store is not None:
        version = _publish(job, store, module, ids, source, result)
        report.note(f"published {job.table} version {version}")
        result = replace(result, version=version, label=job.label)
    return replace(result, seconds=time.perf_counter() - started)


def _check_store(job: Job, store: Store | None) -> None:
    """A store that cannot be written is found before the fit."""
    if job.table is not None:
        if store is None:
            raise ConfigError(f"publishing table {job.table!r} needs a store")
        store.check_writable()


def _budget(job: Job, source: Source) -> int:
    """Bytes that the tensors may take; ConfigError when that is no compression."""
    budget, full_bytes = job.num_bytes(len(source), source.dim), 4 * len(source) * source.dim
    if budget > full_bytes:
        raise ConfigError(
            f"a budget of {budget:,} bytes is more than the whole table takes uncompressed: {full_bytes:,} bytes, "
            f"{len(source):,} vectors of {source.dim} float32"
        )
    return budget


def _fit(job: Job, source: Source, budget: int, report: Silent) -> Scheme:
    return fit_within(
        scheme_class(job.scheme),
        torch.from_numpy(source.vectors_ND),
        budget,
        dtype=job.dtype,
        weights_N=None if source.counts_N is None else torch.from_numpy(source.counts_N),
        options=job.options,
        seed=job.seed,
        progress=report.advanced,
    )


def _publish(job: Job, store: Store, module: Scheme, ids: Vocabulary | None, source: Source, result: Result) -> int:
    """Publish what was fitted, with its figures; the version."""
    assert job.table is not None
    return store.publish(
        job.table,
        module,
        label=job.label,
        dtype=job.dtype,
        ids=ids,
        hot_ids=source.hottest(NUM_HOT_IDS),
        new_id_type=job.new_id_type,
        metrics={"compression": result.metrics()},
    )


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
