"""A loaded version: immutable, on one device, from ids to vectors.

A server captures one of these per request; swapping to a new version is one assignment of another.
"""

# Shapes: B ids in a batch, D embedding_dim, G bags.

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.device import device_named
from embstore.errors import ConfigError, DataError, IdOutOfRange, VerificationFailed
from embstore.ids import PREFIX, Ids, IdSpace, id_space
from embstore.parallel import in_parts
from embstore.pooling import Bags, Pooling, pool
from embstore.quantize import TensorSpec, check_rows_finite, for_kernels, packed_layout, to_torch
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme, SchemeConfig, Tensors
from embstore.store.manifest import Manifest

DEFAULT_VECTOR = "default_vector"
GOLDEN_VECTORS = "golden_vectors"
GPU_TOLERANCE = 1e-5
IDS_A_THREAD = 4096
"""A lookup is split over threads when each gets at least so many ids: about 100 us of work."""
OnMissing = Literal["zero", "default", "error", "hash"]
ON_MISSING: tuple[OnMissing, ...] = ("zero", "default", "error", "hash")
Floats = NDArray[np.float32]


class Fetched(NamedTuple):
    """vectors float32 [B, D], or [G, D] of bags; found bool [B], None: every id was; missing: how many were not."""

    vectors_BD: Floats
    found_B: NDArray[np.bool_] | None
    missing: int


class Resolved(NamedTuple):
    """rows int64 [B], below 0 where no row is to be read; found bool [B], None: every id was; missing: how many not."""

    rows_B: NDArray[np.int64]
    found_B: NDArray[np.bool_] | None
    missing: int


@dataclass(frozen=True, eq=False)
class Table:
    """One version of one table, ready to answer."""

    name: str
    version: int
    scheme: type[Scheme]
    config: SchemeConfig
    tensors: Tensors
    ids: IdSpace
    default_vector_D: Floats
    device: str = "cpu"
    num_threads: int = 1
    manifest: Manifest | None = None
    golden_GD: Floats | None = None
    fingerprint: str = ""
    """Digest of the manifest: the same for the same version of the same store, and for nothing else."""

    @cached_property
    def embedding_dim(self) -> int:
        """Floats in one vector."""
        return self.config.embedding_dim

    @property
    def num_bytes(self) -> int:
        """Bytes that the scheme's tensors and the id space hold, on the device and on the host together."""
        tensors = sum(int(t.nbytes) for t in self.tensors.values())
        return tensors + self.ids.num_bytes() + self.default_vector_D.nbytes

    def fetch(self, ids: Ids, on_missing: str = "zero", out: Floats | None = None) -> Fetched:
        """Vectors of B ids in their order; ids that are not there get what `on_missing` says, and are told apart.

        `zero`: zeros. `default`: the table's default vector. `hash`: the vector of some id, chosen by the id's hash.
        `error`: IdOutOfRange. TypeError when the ids are not what this table's id space takes.
        The vectors are written into `out`, float32 [B, D], where it is given.
        """
        rows_B, missing = self.ids.rows(ids)
        vectors_BD = np.empty((len(rows_B), self.embedding_dim), np.float32) if out is None else out
        rows_B, found_B = self._answer_missing(ids, rows_B, missing, on_missing, vectors_BD)
        self.compose(rows_B, vectors_BD)
        return Fetched(vectors_BD, found_B, missing)

    def resolve(self, ids: Ids, on_missing: str, vectors_BD: Floats) -> Resolved:
        """The first half of `fetch`: rows of B ids, and the vectors of those that no row will fill."""
        rows_B, missing = self.ids.rows(ids)
        return Resolved(*self._answer_missing(ids, rows_B, missing, on_missing, vectors_BD), missing)

    def fetch_bags(self, ids: Ids, bags: Bags, on_missing: str = "zero") -> Fetched:
        """One pooled vector per bag of ids, `embstore.pooling` says how; ids that are not there as in `fetch`.

        `zero`: they are left out of their bags. Found and missing are of ids, not of bags.
        """
        rows_B, missing = self.ids.rows(ids)
        if len(rows_B) != bags.num_ids:
            raise DataError(f"the bags are of {bags.num_ids:,} ids, but there are {len(rows_B):,}")
        unused_BD = np.empty((len(rows_B), 0), np.float32)  # of missing ids only rows and errors matter here
        rows_B, found_B = self._answer_missing(ids, rows_B, missing, on_missing, unused_BD)
        parts = max(1, min(self.num_threads, len(rows_B) // IDS_A_THREAD))
        lookup = partial(self.scheme.lookup, self.config, self.tensors)
        missing_D = self.default_vector_D if missing and on_missing == "default" else None
        with nullcontext() if self.device == "cpu" else device_named(self.device).watched():
            vectors_GD = pool(
                bags, rows_B, lookup, self.embedding_dim, missing_D=missing_D, device=self.device, num_threads=parts
            )
        return Fetched(vectors_GD, found_B, missing)

    @overload
    def lookup(
        self,
        ids: Any,
        *,
        offsets: Any = None,
        pooling: Pooling | None = None,
        weights: Any = None,
        return_found: Literal[False] = False,
        on_missing: str = "zero",
    ) -> Floats: ...
    @overload
    def lookup(
        self,
        ids: Any,
        *,
        offsets: Any = None,
        pooling: Pooling | None = None,
        weights: Any = None,
        return_found: Literal[True],
        on_missing: str = "zero",
    ) -> tuple[Floats, NDArray[np.bool_]]: ...
    def lookup(
        self,
        ids: Any,
        *,
        offsets: Any = None,
        pooling: Pooling | None = None,
        weights: Any = None,
        return_found: bool = False,
        on_missing: str = "zero",
    ) -> Floats | tuple[Floats, NDArray[np.bool_]]:
        """Vectors of ids (integers or strings [B], a tensor too): float32 [B, D]; with `return_found` also bool [B].

        With `offsets` (integers [G], where each bag starts) and `pooling` (sum, mean or max) one vector a bag, [G, D],
        as `torch.nn.EmbeddingBag` gives them; `weights` are numbers [B]. `embstore.pooling` has the fine print.
        """
        ids = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
        if offsets is None and pooling is None and weights is None:
            fetched = self.fetch(ids, on_missing)
        else:
            fetched = self.fetch_bags(ids, Bags.of(len(ids), offsets, pooling, weights), on_missing)
        if not return_found:
            return fetched.vectors_BD
        found_B = fetched.found_B
        return fetched.vectors_BD, np.ones(len(ids), np.bool_) if found_B is None else found_B

    def _answer_missing(
        self, ids: Ids, rows_B: NDArray[np.int64], missing: int, on_missing: str, vectors_BD: Floats
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Fill the vectors that no kernel will touch, or give the missing ids rows of their own; also who was found."""
        if on_missing not in ON_MISSING:
            raise ConfigError(f"on_missing must be one of {', '.join(ON_MISSING)}, got {on_missing!r}")
        if not missing:
            return rows_B, None
        found_B = rows_B >= 0
        if on_missing == "error":
            raise self._missing_error(ids, found_B)
        if on_missing == "hash":
            rows_B = np.where(found_B, rows_B, self.ids.hashed_rows(ids, self.ids.num_ids))
        elif vectors_BD.shape[1]:
            vectors_BD[~found_B] = self.default_vector_D if on_missing == "default" else 0.0
        return rows_B, found_B

    def _missing_error(self, ids: Ids, found_B: NDArray[np.bool_]) -> IdOutOfRange:
        at = np.flatnonzero(~found_B)
        shown = ", ".join(repr(str(ids[i])) if isinstance(ids[i], str) else str(ids[i]) for i in at[:5])
        more = f" and {len(at) - 5:,} more" if len(at) > 5 else ""
        where = f"[0, {self.ids.num_ids})" if self.ids.kind == "dense" else "its vocabulary"
        return IdOutOfRange(
            f"table {self.name!r} does not have id {shown}{more}: not in {where}", table=self.name, version=self.version
        )

    def compose(self, rows_B: NDArray[np.int64], vectors_BD: Floats) -> None:
        """The second half of `fetch`: the scheme's vectors; where a row is below 0 the vector stays as it is."""
        if self.device == "cpu":
            parts = min(self.num_threads, len(rows_B) // IDS_A_THREAD)
            if parts > 1:
                in_parts(parts, partial(self.scheme.lookup, self.config, self.tensors), rows_B, vectors_BD)
            else:
                self.scheme.lookup_cpu(self.config, self.tensors, rows_B, vectors_BD)
        else:
            lookup = partial(self.scheme.lookup, self.config, self.tensors)
            device_named(self.device).compose(lookup, [(rows_B, vectors_BD)])


def make_table(
    manifest: Manifest, arrays: Mapping[str, NDArray[Any]], device: str = "cpu", num_threads: int = 1
) -> Table:
    """The table that a manifest and its arrays describe; VerificationFailed when they do not fit together."""
    what = f"table {manifest.table!r} version {manifest.version}"
    scheme, config, layout = described(manifest)
    for name, slot in (layout | {DEFAULT_VECTOR: TensorSpec((config.embedding_dim,))}).items():
        if name not in arrays:
            raise VerificationFailed(f"{what}: array {name!r} is missing")
        if arrays[name].shape != slot.shape or arrays[name].dtype != slot.numpy_dtype:
            raise VerificationFailed(
                f"{what}: array {name!r} is {arrays[name].dtype} {arrays[name].shape}, "
                f"{manifest.scheme} needs {slot.numpy_dtype} {slot.shape}"
            )
    known = {*layout, DEFAULT_VECTOR, GOLDEN_VECTORS}
    unknown = [name for name in arrays if name not in known and not name.startswith(PREFIX)]
    if unknown or manifest.num_ids > manifest.num_embeddings:
        raise VerificationFailed(f"{what}: unknown arrays {unknown}" if unknown else f"{what}: more ids than rows")
    try:
        scheme.check_tensors(config, arrays)
    except VerificationFailed as error:
        raise VerificationFailed(f"{what}: {error}") from error
    if device == "cpu":
        tensors: dict[str, Any] = {name: for_kernels(arrays[name]) for name in layout}
    else:
        tensors = {name: to_torch(arrays[name], slot.dtype).to(device) for name, slot in layout.items()}
    return Table(
        name=manifest.table,
        version=manifest.version,
        scheme=scheme,
        config=config,
        tensors=tensors,
        ids=id_space(manifest.id_space, manifest.num_ids, arrays),
        default_vector_D=arrays[DEFAULT_VECTOR],
        device=device,
        num_threads=num_threads,
        manifest=manifest,
        golden_GD=arrays.get(GOLDEN_VECTORS),
        fingerprint=hashlib.sha256(manifest.to_json()).hexdigest()[:16],
    )


def described(manifest: Manifest) -> tuple[type[Scheme], SchemeConfig, dict[str, TensorSpec]]:
    """Scheme, config and layout of what a manifest describes; VerificationFailed when there is no such table."""
    try:
        scheme = scheme_class(manifest.scheme)
        config = scheme.Config(
            num_embeddings=manifest.num_embeddings, embedding_dim=manifest.embedding_dim, **manifest.parameters
        )
        return scheme, config, packed_layout(scheme.layout(config), manifest.dtype)
    except (ConfigError, TypeError) as error:
        raise VerificationFailed(f"table {manifest.table!r} version {manifest.version}: {error}") from error


def check_finite(arrays: Mapping[str, NDArray[Any]], what: str, layout: Mapping[str, TensorSpec] | None = None) -> None:
    """VerificationFailed when an array holds NaN or infinity: such a vector must never be served.

    `layout` says which arrays hold rows that are not float32; without it only float arrays are looked at.
    """
    from embstore.kernels.cpu.finite import all_finite

    for name, array in arrays.items():
        if array.dtype == np.float32 and all_finite(np.ascontiguousarray(array).reshape(-1).view(np.uint32)):
            continue
        slot = (layout or {}).get(name)
        bad = check_rows_finite(array, slot.dtype if slot else str(array.dtype))
        if len(bad):
            raise VerificationFailed(f"{what}: array {name!r} holds NaN or infinity (first in row {bad[0]:,})")


def digest(vectors_BD: Floats) -> str:
    """SHA-256, in hex, of float32 vectors as little-endian row-major bytes."""
    return hashlib.sha256(np.ascontiguousarray(vectors_BD, "<f4").tobytes()).hexdigest()


def check_golden(table: Table) -> None:
    """VerificationFailed unless the golden ids' vectors, looked up here and now, have the digest in the manifest."""
    assert table.manifest is not None
    golden = table.manifest.golden
    try:
        vectors_GD = table.fetch(golden.ids, "error").vectors_BD
    except (IdOutOfRange, TypeError) as error:
        raise VerificationFailed(f"table {table.name!r} version {table.version}: golden ids: {error}") from error
    if digest(vectors_GD) != golden.sha256 and not _nearly_golden(table, vectors_GD):
        raise VerificationFailed(
            f"table {table.name!r} version {table.version}: "
            "the golden ids' vectors are not the ones it was published with"
        )


def _nearly_golden(table: Table, vectors_GD: Floats) -> bool:
    """Whether the vectors differ from the published ones by no more than another order of the sums explains.

    Where the arithmetic is the same everywhere they may not differ at all; a GPU fuses multiplications and additions.
    """
    tolerance = table.scheme.tolerance if table.device == "cpu" else max(table.scheme.tolerance, GPU_TOLERANCE)
    golden_GD = table.golden_GD
    if not tolerance or golden_GD is None or golden_GD.shape != vectors_GD.shape or golden_GD.dtype != np.float32:
        return False
    assert table.manifest is not None
    if digest(golden_GD) != table.manifest.golden.sha256:
        return False
    return bool(np.abs(vectors_GD - golden_GD).max() <= tolerance * np.abs(golden_GD).max())
