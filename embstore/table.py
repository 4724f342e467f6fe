"""A loaded version: immutable, on one device, from keys to vectors.

A server captures one of these per request; swapping to a new version is one assignment of another.
"""

# Shapes: B keys in a batch, D embedding_dim.

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.errors import ConfigError, IdOutOfRange, VerificationFailed
from embstore.ids import PREFIX, IdSpace, Keys, id_space
from embstore.manifest import Manifest
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme, SchemeConfig, Tensors

DEFAULT_VECTOR = "default_vector"
OnMissing = Literal["zero", "default", "error", "hash"]
ON_MISSING: tuple[OnMissing, ...] = ("zero", "default", "error", "hash")
Floats = NDArray[np.float32]


class Fetched(NamedTuple):
    """vectors float32 [B, D]; found bool [B], None when every id was found; missing: how many were not."""

    vectors_BD: Floats
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
    manifest: Manifest | None = None
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

    def fetch(self, keys: Keys, on_missing: str = "zero") -> Fetched:
        """Vectors of B keys in their order; ids that are not there get what `on_missing` says, and are told apart.

        `zero`: zeros. `default`: the table's default vector. `hash`: the vector of some id, chosen by the key's hash.
        `error`: IdOutOfRange. TypeError when the keys are not what this table's id space takes.
        """
        rows_B, missing = self.ids.rows(keys)
        vectors_BD = np.empty((len(rows_B), self.embedding_dim), np.float32)
        found_B = None
        if missing:
            found_B = rows_B >= 0
            rows_B = self._settle_missing(keys, rows_B, found_B, vectors_BD, on_missing)
        elif on_missing not in ON_MISSING:
            raise _unknown_policy(on_missing)
        self._compose(rows_B, vectors_BD)
        return Fetched(vectors_BD, found_B, missing)

    @overload
    def lookup(self, ids: Any, *, return_found: Literal[False] = False, on_missing: str = "zero") -> Floats: ...
    @overload
    def lookup(
        self, ids: Any, *, return_found: Literal[True], on_missing: str = "zero"
    ) -> tuple[Floats, NDArray[np.bool_]]: ...
    def lookup(
        self, ids: Any, *, return_found: bool = False, on_missing: str = "zero"
    ) -> Floats | tuple[Floats, NDArray[np.bool_]]:
        """Vectors of ids (integers or strings [B], a tensor too): float32 [B, D]; with `return_found` also bool [B]."""
        keys = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
        fetched = self.fetch(keys, on_missing)
        if not return_found:
            return fetched.vectors_BD
        found_B = fetched.found_B
        return fetched.vectors_BD, np.ones(len(fetched.vectors_BD), np.bool_) if found_B is None else found_B

    def _settle_missing(
        self,
        keys: Keys,
        rows_B: NDArray[np.int64],
        found_B: NDArray[np.bool_],
        vectors_BD: Floats,
        on_missing: str,
    ) -> NDArray[np.int64]:
        """Fill the rows of `vectors` that no kernel will touch, or give the missing ids rows of their own."""
        if on_missing == "zero":
            vectors_BD[~found_B] = 0.0
        elif on_missing == "default":
            vectors_BD[~found_B] = self.default_vector_D
        elif on_missing == "hash":
            return np.where(found_B, rows_B, self.ids.hashed_rows(keys, self.ids.num_ids))
        elif on_missing == "error":
            raise self._missing_error(keys, found_B)
        else:
            raise _unknown_policy(on_missing)
        return rows_B

    def _missing_error(self, keys: Keys, found_B: NDArray[np.bool_]) -> IdOutOfRange:
        at = np.flatnonzero(~found_B)
        shown = ", ".join(repr(str(keys[i])) if isinstance(keys[i], str) else str(keys[i]) for i in at[:5])
        more = f" and {len(at) - 5:,} more" if len(at) > 5 else ""
        where = f"[0, {self.ids.num_ids})" if self.ids.kind == "dense" else "its vocabulary"
        return IdOutOfRange(
            f"table {self.name!r} does not have id {shown}{more}: not in {where}", table=self.name, version=self.version
        )

    def _compose(self, rows_B: NDArray[np.int64], vectors_BD: Floats) -> None:
        if self.device == "cpu":
            self.scheme.lookup(self.config, self.tensors, rows_B, vectors_BD)
        else:
            rows = torch.tensor(rows_B, device=self.device)  # a copy: ids of a request may be read-only
            out = torch.from_numpy(vectors_BD).to(self.device)
            self.scheme.lookup(self.config, self.tensors, rows, out)
            torch.from_numpy(vectors_BD).copy_(out)


def make_table(manifest: Manifest, arrays: Mapping[str, NDArray[Any]], device: str = "cpu") -> Table:
    """The table that a manifest and its arrays describe; VerificationFailed when they do not fit together."""
    what = f"table {manifest.table!r} version {manifest.version}"
    try:
        scheme = scheme_class(manifest.scheme)
        config = scheme.Config(
            num_embeddings=manifest.num_embeddings, embedding_dim=manifest.embedding_dim, **manifest.parameters
        )
    except (ConfigError, TypeError) as error:
        raise VerificationFailed(f"{what}: {error}") from error
    shapes = scheme.shapes(config) | {DEFAULT_VECTOR: (config.embedding_dim,)}
    for name, shape in shapes.items():
        if name not in arrays:
            raise VerificationFailed(f"{what}: array {name!r} is missing")
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            raise VerificationFailed(
                f"{what}: array {name!r} is {arrays[name].dtype} {arrays[name].shape}, "
                f"{manifest.scheme} needs float32 {shape}"
            )
    unknown = [name for name in arrays if name not in shapes and not name.startswith(PREFIX)]
    if unknown or manifest.num_ids > manifest.num_embeddings:
        raise VerificationFailed(f"{what}: unknown arrays {unknown}" if unknown else f"{what}: more ids than rows")
    tensors: dict[str, Any] = {name: arrays[name] for name in scheme.shapes(config)}
    if device != "cpu":
        tensors = {name: torch.tensor(array).to(device) for name, array in tensors.items()}
    return Table(
        name=manifest.table,
        version=manifest.version,
        scheme=scheme,
        config=config,
        tensors=tensors,
        ids=id_space(manifest.id_space, manifest.num_ids, arrays),
        default_vector_D=arrays[DEFAULT_VECTOR],
        device=device,
        manifest=manifest,
        fingerprint=hashlib.sha256(manifest.to_json()).hexdigest()[:16],
    )


def check_finite(arrays: Mapping[str, NDArray[Any]], what: str) -> None:
    """VerificationFailed when a float array holds NaN or infinity: such a vector must never be served."""
    from embstore.kernels.numba_cpu import all_finite

    for name, array in arrays.items():
        if array.dtype == np.float32 and not all_finite(np.ascontiguousarray(array).reshape(-1).view(np.uint32)):
            rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise VerificationFailed(f"{what}: array {name!r} holds NaN or infinity (first in row {row:,})")


def digest(vectors_BD: Floats) -> str:
    """SHA-256, in hex, of float32 vectors as little-endian row-major bytes."""
    return hashlib.sha256(np.ascontiguousarray(vectors_BD, "<f4").tobytes()).hexdigest()


def check_golden(table: Table) -> None:
    """VerificationFailed unless the golden ids' vectors, looked up here and now, have the digest in the manifest."""
    assert table.manifest is not None
    golden = table.manifest.golden
    try:
        found = digest(table.fetch(golden.ids, "error").vectors_BD)
    except (IdOutOfRange, TypeError) as error:
        raise VerificationFailed(f"table {table.name!r} version {table.version}: golden ids: {error}") from error
    if found != golden.sha256:
        raise VerificationFailed(
            f"table {table.name!r} version {table.version}: "
            "the golden ids' vectors are not the ones it was published with"
        )


def _unknown_policy(on_missing: object) -> ConfigError:
    return ConfigError(f"on_missing must be one of {', '.join(ON_MISSING)}, got {on_missing!r}")
