"""`embstore compress`: the options and what they mean; the work is in `run`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from embstore.common.render import compression_table, show
from embstore.errors import ConfigError


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
    dtype: Annotated[
        str, typer.Option(help="How rows are stored: float32, float16, bfloat16, int8 or int4.")
    ] = "float32",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the scheme, e.g. --set bias=true.")
    ] = None,
    keep_order: Annotated[
        bool, typer.Option("--keep-order", help="Leave rows where they are; else counts put hot ids first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn.")] = 0,
    table: Annotated[str | None, typer.Option(help="Publish under this name; without it only report.")] = None,
    store: Annotated[Path, typer.Option("--store", envvar="EMBSTORE_STORE", help="Folder of the store.")] = Path(
        "store"
    ),
    label: Annotated[str, typer.Option(help="Label to move to the new version.")] = "latest",
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Publish without moving any label.")] = False,
    new_id_type: Annotated[
        bool, typer.Option("--new-id-type", help="Move the label even from string ids to integers, or back.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report, with plots, as one HTML file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")] = False,
) -> None:
    """Compress existing vectors, report size and quality, and publish the result where --table is given."""
    from embstore.common.progress import make_reporter
    from embstore.compress import page, run
    from embstore.compress.result import Job
    from embstore.publish import open_store

    job = Job(
        vectors=vectors,
        scheme=scheme,
        budget=budget,
        ratio=ratio,
        counts=counts,
        tensor=tensor,
        dtype=dtype,
        options=parse_options(set_ or []),
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


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs as a mapping; a value is TOML, or plain text where it is not."""
    options = dict[str, Any]()
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"--set takes name=value, as bias=true, got {pair!r}")
        try:
            options[name.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[name.strip()] = text.strip()
    return options
