"""The manifest: everything a reader must know to turn a version's files into vectors, and to trust them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args, get_origin, get_type_hints

from embstore.errors import VerificationFailed

FORMAT_VERSION = 1
Dtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""How the rows of a version's tensors may be stored; `embstore.quantize` says what each looks like."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a version: its name in the version's folder, its size, its SHA-256 in hex."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Ids and the SHA-256 of their vectors (float32, little-endian, row-major): a reader must get the same."""

    ids: list[int] | list[str]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One immutable version of one table, as `manifest.json` says it."""

    table: str
    version: int
    scheme: str
    parameters: dict[str, Any]
    num_embeddings: int
    embedding_dim: int
    dtype: str
    id_space: str
    num_ids: int
    files: list[FileEntry]
    golden: Golden
    created: str
    hot_ids: list[int] | list[str] = field(default_factory=list)
    parent: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        """Bytes of the version's files."""
        return sum(file.num_bytes for file in self.files)

    def to_json(self) -> bytes:
        """The file's bytes: sorted keys, one line per entry, so that two manifests can be compared by eye."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Manifest:
        """Parse strictly; VerificationFailed names `source` and what is wrong with it."""
        try:
            raw = json.loads(data)
            if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {raw['format_version']!r}; this release reads up to {FORMAT_VERSION}")
            if not isinstance(raw["files"], list):
                raise ValueError("files is not a list")
            files = [FileEntry(**entry) for entry in raw.pop("files")]
            manifest = cls(files=files, golden=Golden(**raw.pop("golden")), **raw)
            _check(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VerificationFailed(f"{source}: not a valid manifest: {error}") from error
        return manifest


_HINTS = {name: get_origin(hint) or hint for name, hint in get_type_hints(Manifest).items()}
_PLAIN = {name: kind for name, kind in _HINTS.items() if kind in (str, int, dict)}


def _check(manifest: Manifest) -> None:
    for name, kind in _PLAIN.items():
        value = getattr(manifest, name)
        if not isinstance(value, kind) or (isinstance(value, int) and (isinstance(value, bool) or value < 1)):
            raise ValueError(f"{name} is {value!r}, not {'a positive int' if kind is int else kind.__name__}")
    if not manifest.golden.ids or not isinstance(manifest.golden.sha256, str):
        raise ValueError("golden is not a list of ids and a digest")
    for name, ids in (("golden ids", manifest.golden.ids), ("hot_ids", manifest.hot_ids)):
        if not isinstance(ids, list) or {type(one) for one in ids} not in ({int}, {str}, set()):
            raise ValueError(f"{name} are neither integers nor strings")
    for entry in manifest.files:
        if type(entry.num_bytes) is not int or not isinstance(entry.sha256, str):
            raise ValueError(f"file {entry.name!r} has no size and digest")
        if not _FILE_NAME.fullmatch(entry.name):
            raise ValueError(f"file name {entry.name!r} leaves the version's folder")
    if manifest.parent is not None and (type(manifest.parent) is not int or manifest.parent < 1):
        raise ValueError(f"parent is {manifest.parent!r}, not a version")
    datetime.fromisoformat(manifest.created)
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r}; this release reads {', '.join(DTYPES)}")
