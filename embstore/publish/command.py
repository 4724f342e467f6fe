"""`embstore publish`, `list`, `inspect` and `promote`: the tables of a store, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embstore.common.options import (
    DEFAULT_STORE,
    DtypeOption,
    JsonOption,
    LabelOption,
    NewIdTypeOption,
    NoPromoteOption,
    StoreOption,
    TableArgument,
    VersionOption,
)
from embstore.common.render import columns, facts, show
from embstore.errors import NotFound, VerificationFailed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from embstore.publish.store import Store
    from embstore.store.local import FileStore


def publish(
    table: TableArgument,
    file: Annotated[Path, typer.Argument(help="Vectors: .npy, .safetensors, or .parquet of ids and lists.")],
    store: StoreOption = DEFAULT_STORE,
    dtype: DtypeOption = "float32",
    label: LabelOption = "latest",
    no_promote: NoPromoteOption = False,
    new_id_type: NewIdTypeOption = False,
    json: JsonOption = False,
) -> None:
    """Publish a file of vectors as a new version of a table."""
    from embstore.publish.store import open_store

    opened, moved = open_store(store), None if no_promote else label
    before = opened.labelled(table, moved) if moved else None
    version = opened.publish(table, file, label=moved, dtype=dtype, new_id_type=new_id_type)
    dim, dim_before = opened.manifest(table, version).embedding_dim, before.embedding_dim if before else None
    about = {
        "table": table,
        "version": version,
        "label": moved,
        "embedding_dim": dim,
        "embedding_dim_before": dim_before,
    }
    show(json, about, lambda: published_line(table, version, moved, dim, dim_before))


def published_line(table: str, version: int, label: str | None, dim: int, dim_before: int | None) -> str:
    """A published version, the label that moved, and how long vectors were before."""
    moved = f", label {label} moved to it" if label else ""
    changed = f", embedding_dim {dim_before} -> {dim}" if dim_before not in (None, dim) else ""
    return f"published {table} version {version}{moved}{changed}"


def list_tables(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Tables of a store with their versions, labels and sizes, and its releases."""
    from embstore.store.local import FileStore

    files = FileStore(store)
    versions = [about for table in files.tables() for about in _versions(files, table)]
    releases = [{"release": r.id, "tables": r.tables, "created": r.created} for r in files.releases()]
    none = f"no tables in the store {files.root.absolute()}" if files.exists() else _no_store(files.root)
    about = {"versions": versions, "releases": releases}
    show(json, about, lambda: _listing(versions, releases) if versions else none)


def _versions(files: FileStore, table: str) -> list[dict[str, Any]]:
    """What is said of each version of a table; of a damaged one, what is wrong with it."""
    labels = files.labels(table)
    found: list[dict[str, Any]] = []
    for version in files.versions(table):
        try:
            manifest = files.manifest(table, version)
        except VerificationFailed as error:
            found.append({"table": table, "version": version, "error": str(error)})
            continue
        found.append(
            {
                "table": table,
                "version": version,
                "labels": sorted(label for label, at in labels.items() if at.version == version),
                "scheme": manifest.scheme,
                "ids": manifest.num_ids,
                "dim": manifest.embedding_dim,
                "num_bytes": manifest.num_bytes,
                "created": manifest.created,
            }
        )
    return found


def _listing(versions: list[dict[str, Any]], releases: list[dict[str, Any]]) -> RenderableType:
    """Versions and releases of a store."""
    from rich.console import Group
    from rich.text import Text

    table = columns("table", ">version", "labels", "scheme", ">ids", ">dim", ">bytes", "created (UTC)")
    table.columns[-1].no_wrap = True
    for v in versions:
        if "error" in v:
            table.add_row(v["table"], str(v["version"]), Text(v["error"], style="red"))
            continue
        row = (v["table"], v["version"], ", ".join(v["labels"]), v["scheme"], f"{v['ids']:,}", v["dim"])
        table.add_row(*map(str, row), f"{v['num_bytes']:,}", _minute(v["created"]))
    shown = columns("release", "tables", "created (UTC)")
    for r in releases:
        shown.add_row(r["release"], ", ".join(f"{t} {n}" for t, n in r["tables"].items()), _minute(r["created"]))
    return Group(table, shown) if releases else table


def _minute(created: str) -> str:
    """Date and minute of a moment as manifests write it."""
    return created[:16].replace("T", " ")


def _no_store(root: Path) -> str:
    return f"there is no store {root.absolute()}: no such folder; --store or EMBSTORE_STORE names another"


def opened_store(store: Path) -> Store:
    """A store to read from; NotFound when its folder is not there."""
    from embstore.publish.store import open_store

    opened = open_store(store)
    if not opened.exists():
        raise NotFound(_no_store(opened.root))
    return opened


def inspect(
    table: TableArgument,
    version: VersionOption = "latest",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Everything about one version: scheme, sizes, ids, digests, training metrics. Verifies every byte."""
    loaded = opened_store(store).load(table, version)
    manifest = loaded.manifest
    assert manifest is not None
    full = 4 * manifest.num_embeddings * manifest.embedding_dim
    scheme_bytes = sum(int(t.nbytes) for t in loaded.tensors.values())
    identity = ("table", "version", "scheme", "parameters", "num_embeddings", "embedding_dim", "dtype", "id_space")
    about = {name: getattr(manifest, name) for name in (*identity, "num_ids")} | {
        "scheme_bytes": scheme_bytes,
        "full_bytes": full,
        "ratio": round(full / scheme_bytes, 2),
        "id_space_bytes": loaded.ids.num_bytes(),
        "id_space_bytes_per_id": round(loaded.ids.num_bytes() / manifest.num_ids, 2),
        "file_bytes": manifest.num_bytes,
        "files": {file.name: file.sha256 for file in manifest.files},
        "golden_ids": len(manifest.golden.ids),
        "hot_ids": len(manifest.hot_ids),
        "parent": manifest.parent,
        "created": manifest.created,
        "metrics": manifest.metrics,
        "verified": True,
    }
    show(json, about, lambda: facts(about))


def promote(
    table: TableArgument,
    version: Annotated[str, typer.Argument(help="A version number or another label.")],
    label: Annotated[str, typer.Option(help="The label to move.")] = "latest",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Verify a version and point a label at it; servers that watch the store follow."""
    opened = opened_store(store)
    number = opened.load(table, version).version
    with opened.turn():
        opened.set_label(table, label, number)
    about = {"table": table, "label": label, "version": number}
    show(json, about, lambda: f"label {label} of {table} points at version {number}")
