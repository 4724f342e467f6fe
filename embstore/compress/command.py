"""`embstore compress`: the options and what they mean; the work is in `run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embstore.common.options import (
    DEFAULT_STORE,
    DtypeOption,
    JsonOption,
    LabelOption,
    NewIdTypeOption,
    NoPromoteOption,
    StoreOption,
)
from embstore.common.render import columns, show
from embstore.publish.command import published_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from embstore.compress.result import Result


def compress(
    vectors: Annotated[
        Path, typer.Argument(help="Vectors: .npy, .safetensors, .parquet of ids and lists, or a torch state dict.")
    ],
    scheme: Annotated[str, typer.Option(help="The scheme to fit, as in `embstore train`.")],
    budget: Annotated[str | None, typer.Option(help="Bytes that the published vectors may take, e.g. 64MB.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Or how many times smaller than float32, e.g. 16.")] = None,
    counts: Annotated[
        Path | None, typer.Option(help="How often each id is asked for: .npy in row order, or .parquet of id, count.")
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Which tensor, where the file holds several.")] = None,
    dtype: DtypeOption = "float32",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the scheme, e.g. --set bias=true.")
    ] = None,
    keep_order: Annotated[
        bool, typer.Option("--keep-order", help="Leave rows where they are; else counts put hot ids first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn.")] = 0,
    table: Annotated[str | None, typer.Option(help="Publish under this name; without it only report.")] = None,
    store: StoreOption = DEFAULT_STORE,
    label: LabelOption = "latest",
    no_promote: NoPromoteOption = False,
    new_id_type: NewIdTypeOption = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report, with plots, as one HTML file.")] = None,
    json: JsonOption = False,
) -> None:
    """Compress existing vectors, report size and quality, and publish the result where --table is given."""
    from embstore.common.config import parse_assignment
    from embstore.common.progress import make_reporter
    from embstore.compress import page, run
    from embstore.compress.result import Job
    from embstore.publish.store import open_store

    job = Job(
        vectors=vectors,
        scheme=scheme,
        budget=budget,
        ratio=ratio,
        counts=counts,
        tensor=tensor,
        dtype=dtype,
        options=dict(parse_assignment(text, "bias=true") for text in set_ or []),
        keep_order=keep_order,
        seed=seed,
        table=table,
        label=None if no_promote else label,
        new_id_type=new_id_type,
    )
    with make_reporter(silent=json) as report:
        if html is not None:
            page.check_page(html)
        result = run.compress(job, store=open_store(store), report=report)
        if html is not None:
            page.write_page(html, result)
            report.note(f"report written to {html}")
    show(json, result.to_json(), lambda: compression_table(result))


def compression_table(result: Result) -> RenderableType:
    """What a compression costs and what it keeps, and what it published."""
    from rich.console import Group

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    quality = result.quality
    size = columns("scheme", "rows", ">ids", ">dim", ">bytes", ">ratio", ">bytes for ids", title=result.vectors)
    numbers = (f"{result.num_embeddings:,}", str(result.embedding_dim), f"{result.num_bytes:,}")
    size.add_row(result.scheme, result.dtype, *numbers, f"{result.ratio:.1f}x", f"{result.id_space_bytes:,}")
    percentiles = max((group.percentiles for group in quality.cosines.values()), key=len)
    cosines = columns("cosine", ">ids", *(f">{name}" for name in percentiles))
    for name, group in quality.cosines.items():
        cosines.add_row(name, f"{group.num_ids:,}", *(shown(group.percentiles.get(p)) for p in percentiles))
    kept = columns("measure", ">value")
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
    assert result.table is not None
    moved = result.label, result.embedding_dim, result.embedding_dim_before
    return Group(size, kept, cosines, published_line(result.table, result.version, *moved))
