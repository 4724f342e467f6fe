"""`embstore bench`: the commands, and how their figures are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embstore.common.progress import make_reporter
from embstore.common.render import show
from embstore.errors import ConfigError

app = typer.Typer(help="Measure kernels, schemes and the server on this machine.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]


@app.command()
def kernels(
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme; may be repeated.")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Floats in a vector: 16, 64 and 128 unless given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Ids in a lookup: 100 to 131,072 unless given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Row storage; float32 unless given; may be repeated.")] = None,
    table_size: Annotated[str, typer.Option(help="Bytes of each table.")] = "256MB",
    zipf: Annotated[float | None, typer.Option(help="Draw ids from Zipf with this exponent, not uniformly.")] = None,
    rounds: Annotated[int, typer.Option(help="How often the candidates take turns.")] = 5,
    json: JsonOption = False,
) -> None:
    """Every scheme's lookup beside eager torch and beside the least that reading its bytes takes."""
    from embstore.bench import kernels as bench
    from embstore.bench.machine import describe
    from embstore.common.sizes import parse_bytes
    from embstore.quantize import check_dtype
    from embstore.schemes import SCHEMES, scheme_class

    for name in scheme or ():
        scheme_class(name)
    for name in dtype or ():
        check_dtype(name)
    _at_least("rounds", rounds, 1)
    for size in dim or ():
        _at_least("dim", size, 16)  # the floor writes whole cache lines
        if size % 16:
            raise ConfigError(f"--dim must be a multiple of 16, got {size}")
    for size in batch or ():
        _at_least("batch", size, 1)
    if zipf is not None and (not 0 < zipf < 10 or zipf == 1):
        raise ConfigError(f"--zipf must be above 0, below 10 and not 1 (1.05 is usual), got {zipf}")
    with make_reporter(silent=json) as report:
        rows = bench.measure(
            schemes=tuple(scheme or SCHEMES),
            dims=tuple(dim or bench.DIMS),
            batches=tuple(batch or bench.BATCHES),
            dtypes=tuple(dtype or ("float32",)),
            table_bytes=parse_bytes(table_size),
            zipf=zipf,
            rounds=rounds,
            progress=report.advanced,
        )
    about = describe() | {"ids": "uniform" if zipf is None else f"zipf {zipf}", "table_bytes": parse_bytes(table_size)}
    show(json, {"machine": about, "rows": [row.to_json() for row in rows]}, lambda: kernels_table(rows, about))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name} must be at least {least}, got {value}")


def kernels_table(rows: list[Any], about: dict[str, Any]) -> Any:
    """Rows as a table, the machine below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for name in ("scheme", "rows"):
        table.add_column(name)
    for name in ("dim", "ids", "kernel us", "all cores us", "eager us", "floor us", "x floor", "x faster than eager"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.scheme} {row.kind}".strip(),
            row.dtype,
            str(row.dim),
            f"{row.batch:,}",
            f"{row.kernel_us:,.1f}",
            f"{row.threads_us:,.1f}",
            f"{row.eager_us:,.1f}",
            f"{row.floor_us:,.1f}",
            f"{row.over_floor:.2f}",
            f"{row.over_eager:.1f}",
        )
    return Group(table, Text(", ".join(f"{name} {value}" for name, value in about.items())))


@app.command()
def schemes(
    config: Annotated[Path | None, typer.Argument(help="Training config; the demo's clicks unless given.")] = None,
    ratio: Annotated[float, typer.Option(help="How many times smaller than the plain tables.")] = 8,
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme; may be repeated.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the config.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table into this file, between its markers.")] = None,
    json: JsonOption = False,
) -> None:
    """Train every scheme on the same events at the same size: bytes, cost of a lookup, quality."""
    from embstore.bench import schemes as bench
    from embstore.bench.machine import describe
    from embstore.schemes import scheme_class

    for name in scheme or ():
        scheme_class(name)
    if not 1 <= ratio < float("inf"):
        raise ConfigError(f"--ratio must be at least 1 (1 = uncompressed), got {ratio}")
    if markdown is not None:
        bench.check_markdown(markdown, ratio=ratio, config=config)
    with make_reporter(silent=json) as report:
        rows = bench.measure(
            config, ratio=ratio, names=tuple(scheme or ()), overrides=set_ or [], progress=report.advanced
        )
    if markdown is not None:
        bench.write_markdown(markdown, rows, ratio=ratio, config=config)
    show(json, {"machine": describe(), "rows": [row.to_json() for row in rows]}, lambda: bench.as_table(rows))


@app.command()
def serve(
    rows: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of every single measurement.")] = 3,
    rounds: Annotated[int, typer.Option(help="How often the candidates take turns.")] = 5,
    load: Annotated[
        str, typer.Option(help="Closed loops by wrk, raw (our own), or auto: wrk if it is there.")
    ] = "auto",
    num_ids: Annotated[int, typer.Option(help="Ids of the tables; dhe has 200,000 at most.")] = 2_000_000,
    dim: Annotated[int, typer.Option(help="Floats in a vector.")] = 64,
    json: JsonOption = False,
) -> None:
    """The server on one core, load on another: throughput, latency, caches, workers, overload."""
    from embstore.bench import serve as bench
    from embstore.bench.machine import describe

    _at_least("rounds", rounds, 1)
    _at_least("num-ids", num_ids, 1_000)
    _at_least("dim", dim, 2)
    if dim % 2:
        raise ConfigError(f"--dim must be even, got {dim}")
    if not 0.05 <= seconds <= 3600:
        raise ConfigError(f"--seconds must be between 0.05 and 3600, got {seconds:g}")
    sizes = bench.Sizes(num_ids=num_ids, dim=dim, dhe_ids=min(num_ids, 200_000))
    with make_reporter(silent=json) as report:
        found, tool = bench.measure(
            rows or (), seconds=seconds, rounds=rounds, sizes=sizes, tool=load, progress=report.advanced
        )
    about = describe() | {"load": tool, "seconds": seconds, "rounds": rounds, "num_ids": num_ids, "dim": dim}
    show(json, {"machine": about, "rows": [row.to_json() for row in found]}, lambda: bench.as_table(found, about))
    if not all(row.figures for row in found):
        raise typer.Exit(1)
