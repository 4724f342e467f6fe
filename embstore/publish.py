"""From a trained module, a state dict, an array or a Parquet file to a published version, and back to a table."""

# Shapes: N num_embeddings, D embedding_dim.

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embstore.errors import ConfigError, DataError, LabelNotFound, NotFound
from embstore.ids import Dense, IdSpace, Keys, Vocabulary
from embstore.manifest import Golden, Manifest
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme, SchemeConfig
from embstore.store import LATEST, FileStore, Release, StagedVersion, check_name, now
from embstore.table import DEFAULT_VECTOR, Table, check_finite, check_golden, digest, make_table
from embstore.vectors import read_vectors

NUM_GOLDEN = 16
MAX_MEAN_ROWS = 1 << 20


@dataclass(frozen=True)
class Publication:
    """What to publish as one table.

    source: a scheme module, an `nn.Embedding`, an array or tensor [N, D], or a state dict (then `scheme` and
    `parameters` say what it is; a single 2-d array is taken for `full`).
    ids: an IdSpace, or the keys in row order; None: ids are 0 .. N - 1.
    hot_ids: the most requested keys, hottest first. metrics: figures to keep with the version.
    default_vector: float [D] for on_missing=default; None: the mean of the table's vectors.
    """

    source: Any
    ids: IdSpace | Keys | None = None
    hot_ids: Sequence[int] | Sequence[str] | NDArray[Any] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    default_vector: NDArray[Any] | None = None
    scheme: str | None = None
    parameters: Mapping[str, Any] | None = None


class Store(FileStore):
    """A store that speaks of modules and tables: `publish` and `load`."""

    def publish(self, table: str, source: Any, *, label: str | None = LATEST, **options: Any) -> int:
        """Publish one version of one table and point `label` at it; returns its number.

        `source` and `options` are the fields of Publication; a path is read as a file of vectors. Raises
        VerificationFailed on NaN or infinity, DataError or ConfigError on what cannot be a table, StoreError when the
        disk refuses. After an error nothing is published.
        """
        if isinstance(source, str | os.PathLike):
            vectors_ND, keys = read_vectors(Path(source))
            source, options = vectors_ND, {"ids": keys, **options}
        with self._stage(table, Publication(source, **options)) as staged:
            version = staged.commit()
        if label is not None:
            self.set_label(table, label, version)
        return version

    def publish_release(self, tables: Mapping[str, Publication], *, label: str | None = LATEST) -> Release:
        """Publish several tables that belong together, as one release, and point `label` of each at its version.

        Everything is written and checked before the first version becomes visible.
        """
        if not tables:
            raise ConfigError("a release needs at least one table")
        with ExitStack() as stack:
            staged = {name: stack.enter_context(self._stage(name, tables[name])) for name in tables}
            versions = {name: version.commit() for name, version in staged.items()}
        release = self.write_release(versions)
        if label is not None:
            for name, version in versions.items():
                self.set_label(name, label, version, release=release.id)
        return release

    def load(self, table: str, version: int | str = LATEST, *, device: str = "cpu", verify: bool = True) -> Table:
        """A table ready for lookups, by version number or label; VerificationFailed when it cannot be trusted.

        Verifying reads every byte once: digests, NaN and infinity, and the golden ids' vectors on this device.
        """
        stored = self.read_version(table, self.resolve(table, version), verify=verify)
        if verify:
            check_finite(stored.arrays, f"table {table!r} version {stored.manifest.version}")
        loaded = make_table(stored.manifest, stored.arrays, device)
        if verify:
            check_golden(loaded)
        return loaded

    def _stage(self, name: str, publication: Publication) -> StagedVersion:
        """Check, describe and write one version; it is not visible before its `commit`."""
        check_name("table", name)
        scheme, config, tensors = _tensors(publication)
        check_finite(tensors, f"table {name!r}")
        ids = _id_space(publication.ids, config.num_embeddings)
        draft = Table(name, 0, scheme, config, tensors, ids, np.zeros(config.embedding_dim, np.float32))
        default_D = _default_vector(draft, publication.default_vector)
        golden = ids.keys(np.unique(np.linspace(0, ids.num_ids - 1, NUM_GOLDEN).astype(np.int64)))
        manifest = Manifest(
            table=name,
            version=1,  # settled when the version gets its number
            scheme=scheme.name,
            parameters=config.parameters(),
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            dtype="float32",
            id_space=ids.kind,
            num_ids=ids.num_ids,
            files=[],
            golden=Golden(ids=golden, sha256=digest(draft.fetch(golden, "error").vectors_BD)),
            created=now(),
            hot_ids=_hot_ids(publication.hot_ids, ids),
            parent=self._parent(name),
            metrics=dict(publication.metrics),
        )
        arrays = tensors | ids.arrays() | {DEFAULT_VECTOR: default_D}
        make_table(replace(manifest), arrays)  # what a reader will check, checked before anything is written
        return self.stage(manifest, arrays)

    def _parent(self, table: str) -> int | None:
        try:
            return self.resolve(table, LATEST)
        except (LabelNotFound, NotFound):
            return None


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store at a path; it need not exist yet, the first publish creates it."""
    return Store(path)


def _tensors(publication: Publication) -> tuple[type[Scheme], SchemeConfig, dict[str, NDArray[Any]]]:
    """Scheme, config and float32 arrays of whatever was given."""
    source = publication.source
    if isinstance(source, Scheme):
        if publication.scheme is not None or publication.parameters is not None:
            raise ConfigError("a scheme module says itself what it is: leave scheme and parameters out")
        return type(source), source.config, _arrays(source.state_dict())
    if isinstance(source, nn.Embedding):
        source = {"weight": source.weight}
    if not isinstance(source, Mapping):
        source = {"weight": source}
    arrays = _arrays(source)
    scheme = scheme_class(publication.scheme or "full")
    if scheme.name == "full" and len(arrays) == 1:
        arrays = {"weight": next(iter(arrays.values()))}
        if arrays["weight"].ndim != 2 or 0 in arrays["weight"].shape:
            raise DataError(f"a table of vectors has shape [ids, dims], got {list(arrays['weight'].shape)}")
        rows, dim = arrays["weight"].shape
        return scheme, SchemeConfig(num_embeddings=rows, embedding_dim=dim), arrays
    if publication.scheme is None or publication.parameters is None:
        raise ConfigError("a state dict needs scheme and parameters (with num_embeddings and embedding_dim)")
    try:
        return scheme, scheme.Config(**publication.parameters), arrays
    except TypeError as error:
        raise ConfigError(f"parameters of {scheme.name}: {error}") from error


def _arrays(source: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    def one(name: str, value: Any) -> NDArray[Any]:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise DataError(f"array {name!r} holds {array.dtype}, vectors are numbers")
        return np.ascontiguousarray(array, np.float32)

    return {name: one(name, value) for name, value in source.items()}


def _id_space(ids: IdSpace | Keys | None, num_embeddings: int) -> IdSpace:
    if ids is None:
        return Dense(num_embeddings)
    space = ids if isinstance(ids, IdSpace) else Vocabulary.from_keys(ids)
    if not 1 <= space.num_ids <= num_embeddings:
        raise DataError(f"{space.num_ids:,} ids do not fit a table of {num_embeddings:,} rows")
    return space


def _hot_ids(hot_ids: Any, ids: IdSpace) -> list[Any]:
    listed: list[Any] = hot_ids.tolist() if isinstance(hot_ids, np.ndarray) else list(hot_ids)
    if listed:
        rows, missing = ids.rows(listed)
        if missing:
            bad = listed[int(np.flatnonzero(rows < 0)[0])]
            raise DataError(f"hot id {bad!r} is not among the table's ids")
    return listed


def _default_vector(table: Table, given: NDArray[Any] | None) -> NDArray[np.float32]:
    """The given vector, or the mean of the table's vectors (of 2**20 evenly spaced ones where there are more)."""
    if given is not None:
        vector = np.asarray(given, np.float32)
        if vector.shape != (table.embedding_dim,) or not np.isfinite(vector).all():
            raise DataError(f"default_vector must be {table.embedding_dim} finite numbers")
        return np.ascontiguousarray(vector)
    num_ids = table.ids.num_ids
    rows = np.unique(np.linspace(0, num_ids - 1, min(num_ids, MAX_MEAN_ROWS)).astype(np.int64))
    total = np.zeros(table.embedding_dim, np.float64)
    for start in range(0, len(rows), 1 << 14):
        chunk = rows[start : start + (1 << 14)]
        out = np.empty((len(chunk), table.embedding_dim), np.float32)
        table.scheme.lookup(table.config, table.tensors, chunk, out)
        total += out.sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)
