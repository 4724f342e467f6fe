"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def console() -> Any:
    """Where tables go; names and keys may hold brackets, so nothing is markup."""
    from rich.console import Console

    return Console(markup=False)


def show(json: bool, value: Any, for_people: Callable[[], Any]) -> None:
    """JSON on stdout, or what `for_people()` makes of it."""
    if json:
        import orjson

        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode()
        sys.stdout.write(text + "\n")
    else:
        shown = for_people()
        console().print(shown, highlight=False, soft_wrap=isinstance(shown, str))  # a path stays in one piece


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table; `>` in front of a column's name puts it to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for column in columns:
        if column.startswith(">"):
            table.add_column(column[1:], justify="right", overflow="fold", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    return table


def listing(versions: list[dict[str, Any]], releases: list[dict[str, Any]]) -> Any:
    """Versions and releases of a store."""
    from rich.console import Group
    from rich.text import Text

    table = new_table("table", ">version", "labels", "scheme", ">ids", ">dim", ">bytes", "created (UTC)")
    table.columns[-1].no_wrap = True
    for v in versions:
        if "error" in v:
            table.add_row(v["table"], str(v["version"]), Text(v["error"], style="red"))
            continue
        row = (v["table"], v["version"], ", ".join(v["labels"]), v["scheme"], f"{v['ids']:,}", v["dim"])
        table.add_row(*map(str, row), f"{v['num_bytes']:,}", _minute(v["created"]))
    shown = new_table("release", "tables", "created (UTC)")
    for r in releases:
        shown.add_row(r["release"], ", ".join(f"{t} {n}" for t, n in r["tables"].items()), _minute(r["created"]))
    return Group(table, shown) if releases else table


def _minute(created: str) -> str:
    """Date and minute of a moment as manifests write it."""
    return created[:16].replace("T", " ")


def moved_line(label: str | None, dim: int, dim_before: int | None) -> str:
    """What else is worth saying of a published version: the label that moved, and how long vectors were before."""
    moved = f", label {label} moved to it" if label else ""
    return moved + (f", embedding_dim {dim_before} -> {dim}" if dim_before not in (None, dim) else "")


def facts(about: dict[str, Any]) -> Any:
    """One name and value per line."""
    table = new_table("what", "value")
    for name, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table


def vectors_table(table: str, version: int, ids: list[str], rows: list[list[float]], found: list[bool]) -> Any:
    """Ids with the beginning of their vectors."""
    shown = new_table(
        "id", "found", f"vector ({len(rows[0])} floats)" if rows else "vector", title=f"{table} v{version}"
    )
    for key, row, there in zip(ids, rows, found, strict=True):
        text = ", ".join(f"{x:.4f}" for x in row[:6]) + (", ..." if len(row) > 6 else "")
        shown.add_row(key, "yes" if there else "no", text)
    return shown


def training_table(result: Any) -> Any:
    """What a training run reached, and what it published."""
    from rich.console import Group

    quality = new_table("test metric", ">trained", ">popularity")
    for name, value in result.metrics.items():
        quality.add_row(name, f"{value:.4f}", f"{result.popularity[name]:.4f}")
    tables = new_table("table", ">version", "scheme", ">ids", ">dim", ">bytes", ">ratio")
    for name, t in result.tables.items():
        sizes = (f"{t.num_embeddings:,}", str(t.embedding_dim), f"{t.num_bytes:,}", f"{t.ratio:.1f}x")
        tables.add_row(name, str(t.version), t.scheme, *sizes)
    return Group(quality, tables, f"release {result.release}, {result.seconds:.1f} s on {result.device}")


def compression_table(result: Any) -> Any:
    """What a compression costs and what it keeps, and what it published."""
    from rich.console import Group

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    quality = result.quality
    size = new_table("scheme", "rows", ">ids", ">dim", ">bytes", ">ratio", ">bytes for ids", title=result.vectors)
    numbers = (f"{result.num_embeddings:,}", str(result.embedding_dim), f"{result.num_bytes:,}")
    size.add_row(result.scheme, result.dtype, *numbers, f"{result.ratio:.1f}x", f"{result.id_space_bytes:,}")
    percentiles = max((group.percentiles for group in quality.cosines.values()), key=len)
    cosines = new_table("cosine", ">ids", *(f">{name}" for name in percentiles))
    for name, group in quality.cosines.items():
        cosines.add_row(name, f"{group.num_ids:,}", *(shown(group.percentiles.get(p)) for p in percentiles))
    kept = new_table("measure", ">value")
    if result.quality.error_by_popularity is not None:
        kept.add_row("relative error, weighted by count", shown(quality.relative_error))
    kept.add_row("relative error, every id alike", shown(quality.relative_error_unweighted))
    if quality.recall is not None:
        for name in ("cosine", "inner_product"):
            title = (
                f"recall@{quality.recall.neighbours} of {quality.recall.num_queries:,} ids, {name.replace('_', ' ')}"
            )
            kept.add_row(title, shown(getattr(quality.recall, name)))
    if result.version is None:
        return Group(size, kept, cosines, "nothing is published: --table NAME publishes it")
    moved = moved_line(result.label, result.embedding_dim, result.embedding_dim_before)
    return Group(size, kept, cosines, f"published {result.table} version {result.version}{moved}")


def curl_lines(store: Any, folder: Path, url: str = "http://127.0.0.1:8000") -> str:
    """Three lines that work as they are, once the server runs."""
    tables = store.tables()
    hot = {name: store.manifest(name, store.resolve(name)).hot_ids[:2] for name in tables}

    def body(value: Any) -> str:
        import orjson

        return orjson.dumps(value).decode()

    first, last = tables[0], tables[-1]
    many = {"tables": {name: {"ids": hot[name]} for name in tables}}
    octets = "".join(f"\\{byte:03o}" for key in hot[last] for byte in int(key).to_bytes(8, "little", signed=True))
    binary = f"curl {url}/v1/tables/{last}/lookup -H 'Content-Type: application/octet-stream' --data-binary @- -s"
    return "\n".join(
        [
            "",
            f"The demo store is in {folder / 'store'}. Once a server serves it, in another terminal:",
            "",
            f"curl {url}/v1/tables/{first}/lookup -H 'Content-Type: application/json' -d '{body({'ids': hot[first]})}'",
            "",
            f"curl {url}/v1/lookup -H 'Content-Type: application/json' -d '{body(many)}'",
            "",
            f"printf '{octets}' | {binary} | od -A d -t f4 | head -4",
            "",
        ]
    )
