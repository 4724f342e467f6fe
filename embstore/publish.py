"""From a trained module, a state dict, an array or a Parquet file to a published version, and back to a table."""

# Shapes: N num_embeddings, D embedding_dim.

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embstore.errors import ConfigError, Conflict, DataError, NotFound, VerificationFailed
from embstore.ids import Dense, IdSpace, Keys, StringVocabulary, Vocabulary
from embstore.parallel import num_cores
from embstore.quantize import TensorSpec, for_kernels, pack_tensors, packed_layout
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme, SchemeConfig
from embstore.store.local import LATEST, FileStore, Release, StagedVersion, StoredVersion, check_label, check_name, now
from embstore.store.manifest import Golden, Manifest
from embstore.table import (
    DEFAULT_VECTOR,
    GOLDEN_VECTORS,
    Table,
    check_finite,
    check_golden,
    described,
    digest,
    make_table,
)
from embstore.vectors import read_vectors

NUM_GOLDEN = 16
MAX_MEAN_ROWS = 1 << 20


@dataclass(frozen=True)
class Publication:
    """What to publish as one table.

    source: a scheme module, an `nn.Embedding`, an array or tensor [N, D], or a state dict (then `scheme` and
    `parameters` say what it is; a single 2-d array is taken for `full`).
    ids: an IdSpace, or the keys in row order; None: ids are 0 .. N - 1.
    hot_ids: the most requested keys, hottest first.
    metrics: figures to keep with the version: JSON values, numpy's numbers and arrays too; NaN and infinity are not.
    default_vector: float [D] for on_missing=default; None: the mean of the table's vectors.
    dtype: how rows are stored: float32, float16, bfloat16, int8 or int4 (see embstore/quantize.py).
    new_id_type: a label may move from string ids to integers, or back; else that is a Conflict, since whoever follows
    the label would get errors at once.
    """

    source: Any
    ids: IdSpace | Keys | None = None
    hot_ids: Sequence[int] | Sequence[str] | NDArray[Any] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    default_vector: Any = None
    scheme: str | None = None
    parameters: Mapping[str, Any] | None = None
    dtype: str = "float32"
    new_id_type: bool = False


class Store(FileStore):
    """A store that speaks of modules and tables: `publish` and `load`."""

    def publish(self, table: str, source: Any, *, label: str | None = LATEST, **options: Any) -> int:
        """Publish one version of one table and point `label` at it; returns its number.

        `source` and `options` are the fields of Publication; a path is read as a file of vectors. Raises
        VerificationFailed on NaN or infinity, DataError or ConfigError on what cannot be a table, Conflict when the
        label points at ids of another type, StoreError when the disk refuses. After an error no label has moved; a disk
        that fails while the label is moved, the last step, leaves a complete version without one.
        """
        if isinstance(source, str | os.PathLike):
            vectors_ND, keys = read_vectors(Path(source))
            source, options = vectors_ND, {"ids": keys, **options}
        if label is not None:
            check_label(label)
        publication = Publication(source, **options)
        with self._stage(table, publication) as staged, self.turn():
            if label is not None and not publication.new_id_type:
                self.check_id_type(table, label, staged.draft.id_space)
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
        if label is not None:
            check_label(label)
        with ExitStack() as stack:
            staged = {name: stack.enter_context(self._stage(name, tables[name])) for name in tables}
            stack.enter_context(self.turn())
            for name, publication in tables.items():
                if label is not None and not publication.new_id_type:
                    self.check_id_type(name, label, staged[name].draft.id_space)
            versions = {name: version.commit() for name, version in staged.items()}
            release = self.write_release(versions)
            if label is not None:
                for name, version in versions.items():
                    self.set_label(name, label, version, release=release.id)
        return release

    def check_id_type(self, table: str, label: str, id_space: str) -> None:
        """Conflict when `label` points at string ids and this kind of id space has integers, or the other way round."""
        before = self.labelled(table, label)
        if before is None or (before.id_space == StringVocabulary.kind) == (id_space == StringVocabulary.kind):
            return
        old, new = ("strings", "integers") if before.id_space == StringVocabulary.kind else ("integers", "strings")
        raise Conflict(
            f"table {table!r}: label {label!r} points at version {before.version}, whose ids are {old}, and those of "
            f"the new one are {new}: requests would fail; new_id_type (--new-id-type) moves the label all the same, "
            "label=None (--no-promote) leaves it where it is"
        )

    def load(
        self,
        table: str,
        version: int | str = LATEST,
        *,
        device: str = "cpu",
        verify: bool = True,
        num_threads: int | None = None,
    ) -> Table:
        """A table ready for lookups, by version number or label; VerificationFailed when it cannot be trusted.

        Verifying reads every byte once: digests, NaN and infinity, and the golden ids' vectors on this device.
        num_threads: how many threads share a large lookup; None: as many as this process has cores.
        """
        threads = num_cores() if num_threads is None else num_threads
        stored = self.read_version(table, self.resolve(table, version), verify=verify)
        if verify:
            return self.verified_table(stored, device=device, num_threads=threads)
        return make_table(stored.manifest, stored.arrays, device, threads)

    @staticmethod
    def verified_table(stored: StoredVersion, *, device: str = "cpu", num_threads: int = 1) -> Table:
        """The table of a version whose digests were checked, once its numbers and golden ids are checked too."""
        manifest = stored.manifest
        check_finite(stored.arrays, f"table {manifest.table!r} version {manifest.version}", described(manifest)[2])
        table = make_table(manifest, stored.arrays, device, num_threads)
        check_golden(table)
        return table

    def _stage(self, name: str, publication: Publication) -> StagedVersion:
        """Check, describe and write one version; it is not visible before its `commit`."""
        check_name("table", name)
        what = f"table {name!r}"
        scheme, config, tensors = _tensors(publication)
        layout = scheme.layout(config)
        _check_layout(scheme, layout, tensors)
        scheme.check_tensors(config, tensors)
        check_finite(tensors, what, layout)
        ids = _id_space(publication.ids, config.num_embeddings)
        packed = _packed(tensors, layout, publication.dtype, what)
        kernel_arrays = {key: for_kernels(array) for key, array in packed.items()}
        draft = Table(name, 0, scheme, config, kernel_arrays, ids, np.zeros(config.embedding_dim, np.float32))
        default_D = _default_vector(draft, publication.default_vector)
        golden = ids.keys(np.unique(np.linspace(0, ids.num_ids - 1, NUM_GOLDEN).astype(np.int64)))
        golden_GD = draft.fetch(golden, "error").vectors_BD
        manifest = Manifest(
            table=name,
            version=1,  # settled when the version gets its number
            scheme=scheme.name,
            parameters=config.parameters(),
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            dtype=publication.dtype,
            id_space=ids.kind,
            num_ids=ids.num_ids,
            files=[],
            golden=Golden(ids=golden, sha256=digest(golden_GD)),
            created=now(),
            hot_ids=_hot_ids(publication.hot_ids, ids),
            parent=self._parent(name),
            metrics={str(key): _plain(value, f"metrics[{key!r}]") for key, value in publication.metrics.items()},
        )
        arrays = packed | ids.arrays() | {DEFAULT_VECTOR: default_D, GOLDEN_VECTORS: golden_GD}
        make_table(Manifest.from_json(manifest.to_json(), what), arrays)  # what a reader checks, before writing
        return self.stage(manifest, arrays)

    def _parent(self, table: str) -> int | None:
        try:
            return self.resolve(table, LATEST)
        except (NotFound, VerificationFailed):  # a damaged label is about to be replaced
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
        config, tensors = source.export()
        layout = type(source).layout(config)
        return type(source), config, {name: _array(value, name, layout) for name, value in tensors.items()}
    if isinstance(source, nn.Embedding):
        source = {"weight": source.weight}
    if not isinstance(source, Mapping):
        source = {"weight": source}
    scheme = scheme_class(publication.scheme or "full")
    if scheme.name == "full" and len(source) == 1:
        weight = _float32(next(iter(source.values())), f"array {next(iter(source))!r}")
        if weight.ndim != 2 or 0 in weight.shape:
            raise DataError(f"a table of vectors has shape [ids, dims], got {list(weight.shape)}")
        if publication.parameters is None:
            rows, dim = weight.shape
            return scheme, SchemeConfig(num_embeddings=rows, embedding_dim=dim), {"weight": weight}
        source = {"weight": weight}
    if publication.scheme is None or publication.parameters is None:
        raise ConfigError("a state dict needs scheme and parameters (with num_embeddings and embedding_dim)")
    try:
        config = scheme.Config(**publication.parameters)
    except TypeError as error:
        raise ConfigError(f"parameters of {scheme.name}: {error}") from error
    layout = scheme.layout(config)
    return scheme, config, {name: _array(value, name, layout) for name, value in source.items()}


def _array(value: Any, name: str, layout: Mapping[str, TensorSpec]) -> NDArray[Any]:
    """A tensor as it is published: floats as float32, and codes, maps and packed rows in the scheme's own dtype."""
    if name not in layout or layout[name].dtype == "float32":
        return _float32(value, f"array {name!r}")
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    dtype = layout[name].numpy_dtype
    if array.dtype.kind not in "iu" or (array.size and not (array.astype(dtype) == array).all()):
        raise DataError(f"array {name!r} holds {array.dtype} numbers that are not {dtype}, which the scheme stores")
    return np.ascontiguousarray(array, dtype)


def _packed(
    tensors: Mapping[str, NDArray[Any]], layout: Mapping[str, TensorSpec], dtype: str, what: str
) -> dict[str, NDArray[Any]]:
    """The tensors with rows stored as `dtype`; VerificationFailed names a row that the dtype cannot hold."""
    try:
        packed = pack_tensors(tensors, layout, dtype)
    except VerificationFailed as error:
        raise VerificationFailed(f"{what}: {error}") from error
    changed = {name: array for name, array in packed.items() if array is not tensors[name]}
    check_finite(changed, f"{what} as {dtype}", packed_layout(layout, dtype))
    return packed


def _float32(value: Any, what: str) -> NDArray[np.float32]:
    """Numbers of any kind, from numpy, torch or lists, as float32; too large ones become infinity."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.float().numpy() if value.is_floating_point() else value.numpy()  # numpy has no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} holds {array.dtype}, vectors are numbers")
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32, order="C")


def _check_layout(scheme: type[Scheme], layout: Mapping[str, TensorSpec], tensors: Mapping[str, NDArray[Any]]) -> None:
    """DataError unless these are the scheme's arrays; kernels trust them and must not see others."""
    wanted = {name: slot.shape for name, slot in layout.items()}
    given = {name: array.shape for name, array in tensors.items()}
    if wanted != given:
        shown = [", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) for shapes in (wanted, given)]
        raise DataError(f"a {scheme.name} table of these parameters is made of {shown[0]}, got {shown[1] or 'nothing'}")


def _id_space(ids: IdSpace | Keys | None, num_embeddings: int) -> IdSpace:
    if ids is None:
        return Dense(num_embeddings)
    space = ids if isinstance(ids, IdSpace) else Vocabulary.from_keys(ids)
    if not 1 <= space.num_ids <= num_embeddings:
        raise DataError(f"{space.num_ids:,} ids do not fit a table of {num_embeddings:,} rows")
    return space


def _hot_ids(hot_ids: Any, ids: IdSpace) -> list[int] | list[str]:
    listed: list[Any] = hot_ids.tolist() if isinstance(hot_ids, np.ndarray | torch.Tensor) else list(hot_ids)
    if not listed:
        return []
    try:
        rows, missing = ids.rows(listed)
    except TypeError as error:
        raise DataError(f"hot_ids: {error}") from error
    if missing:
        bad = listed[int(np.flatnonzero(rows < 0)[0])]
        raise DataError(f"hot id {bad!r} is not among the table's ids")
    return ids.keys(rows)


def _plain(value: Any, what: str) -> Any:
    """A metric as JSON has it; DataError names the one that JSON does not have."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{what}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} is {value}: metrics are finite, leave it out or give None")
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise DataError(f"{what} is of type {type(value).__name__}: metrics are numbers, strings, lists and mappings")
    return value


def _default_vector(table: Table, given: Any) -> NDArray[np.float32]:
    """The given vector, or the mean of the table's vectors (of 2**20 evenly spaced ones where there are more).

    VerificationFailed when finite arrays compose to infinite vectors, which only shows here.
    """
    mean = _mean_vector(table)
    if not np.isfinite(mean).all():
        raise VerificationFailed(f"table {table.name!r}: vectors composed of its arrays hold NaN or infinity")
    if given is None:
        return mean
    vector = _float32(given, "default_vector")
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
