"""A publication checked, described and written where no reader looks yet."""

# Shapes: D embedding_dim, G golden ids.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import DataError, NotFound, VerificationFailed
from embstore.publish.publication import (
    Publication,
    as_float32,
    check_layout,
    hot_ids_of,
    id_space_of,
    plain_metric,
    scheme_tensors,
)
from embstore.quantize import TensorSpec, for_kernels, pack_tensors, packed_layout
from embstore.store.local import LATEST, FileStore, check_name, now
from embstore.store.manifest import Golden, Manifest
from embstore.store.staged import StagedVersion
from embstore.table import DEFAULT_VECTOR, GOLDEN_VECTORS, Table, check_finite, digest, make_table

NUM_GOLDEN = 16
MAX_MEAN_ROWS = 1 << 20

Arrays = dict[str, NDArray[Any]]


def stage(store: FileStore, name: str, publication: Publication) -> StagedVersion:
    """Check, describe and write one version; it is not visible before its `commit`."""
    check_name("table", name)
    table, packed = _draft(name, publication)
    default_D = _default_vector(table, publication.default_vector)
    golden = table.ids.ids_of(np.unique(np.linspace(0, table.ids.num_ids - 1, NUM_GOLDEN).astype(np.int64)))
    golden_GD = table.fetch(golden, "error").vectors_BD
    manifest = Manifest(
        table=name,
        version=1,  # replaced when the version gets its number
        scheme=table.scheme.name,
        parameters=table.config.parameters(),
        num_embeddings=table.config.num_embeddings,
        embedding_dim=table.embedding_dim,
        dtype=publication.dtype,
        id_space=table.ids.kind,
        num_ids=table.ids.num_ids,
        files=[],
        golden=Golden(ids=golden, sha256=digest(golden_GD)),
        created=now(),
        hot_ids=hot_ids_of(publication.hot_ids, table.ids),
        parent=_parent(store, name),
        metrics={str(key): plain_metric(value, f"metrics[{key!r}]") for key, value in publication.metrics.items()},
    )
    arrays = packed | table.ids.arrays() | {DEFAULT_VECTOR: default_D, GOLDEN_VECTORS: golden_GD}
    make_table(Manifest.from_json(manifest.to_json(), f"table {name!r}"), arrays)  # checks what a reader will
    return store.stage(manifest, arrays)


def _draft(name: str, publication: Publication) -> tuple[Table, Arrays]:
    """The table to be published, for looking vectors up before it is, and the scheme's arrays as they are stored."""
    what = f"table {name!r}"
    scheme, config, tensors = scheme_tensors(publication)
    layout = scheme.layout(config)
    check_layout(scheme, layout, tensors)
    scheme.check_tensors(config, tensors)
    check_finite(tensors, what, layout)
    ids = id_space_of(publication.ids, config.num_embeddings)
    packed = _packed(tensors, layout, publication.dtype, what)
    kernel_arrays = {key: for_kernels(array) for key, array in packed.items()}
    return Table(name, 0, scheme, config, kernel_arrays, ids, np.zeros(config.embedding_dim, np.float32)), packed


def _packed(tensors: Mapping[str, NDArray[Any]], layout: Mapping[str, TensorSpec], dtype: str, what: str) -> Arrays:
    """The tensors with rows stored as `dtype`; VerificationFailed names a row that the dtype cannot hold."""
    try:
        packed = pack_tensors(tensors, layout, dtype)
    except VerificationFailed as error:
        raise VerificationFailed(f"{what}: {error}") from error
    changed = {name: array for name, array in packed.items() if array is not tensors[name]}
    check_finite(changed, f"{what} as {dtype}", packed_layout(layout, dtype))
    return packed


def _parent(store: FileStore, table: str) -> int | None:
    try:
        return store.resolve(table, LATEST)
    except (NotFound, VerificationFailed):  # a damaged label is about to be replaced
        return None


def _default_vector(table: Table, given: Any) -> NDArray[np.float32]:
    """The given vector, or the mean of the table's vectors (of 2**20 evenly spaced ones where there are more).

    VerificationFailed when finite arrays compose to infinite vectors, which only shows here.
    """
    mean = _mean_vector(table)
    if not np.isfinite(mean).all():
        raise VerificationFailed(f"table {table.name!r}: vectors composed of its arrays hold NaN or infinity")
    if given is None:
        return mean
    vector = as_float32(given, "default_vector")
    if vector.shape != (table.embedding_dim,) or not np.isfinite(vector).all():
        raise DataError(f"default_vector must be {table.embedding_dim} finite numbers")
    return vector


def _mean_vector(table: Table) -> NDArray[np.float32]:
    num_ids = table.ids.num_ids
    rows = np.unique(np.linspace(0, num_ids - 1, min(num_ids, MAX_MEAN_ROWS)).astype(np.int64))
    total = np.zeros(table.embedding_dim, np.float64)
    for start in range(0, len(rows), 1 << 14):
        chunk = rows[start : start + (1 << 14)]
        out = np.empty((len(chunk), table.embedding_dim), np.float32)
        table.scheme.lookup(table.config, table.tensors, chunk, out)
        with np.errstate(invalid="ignore"):  # infinity less infinity; the caller looks
            total += out.sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)
