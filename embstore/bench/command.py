"""`embstore bench`: the commands, and how their figures are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embstore.common.progress import make_reporter
from embstore.common.render import show
from embstore.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

app = typer.Typer(help="Compare schemes on this machine: lookups, training, quality.", no_args_is_help=True)
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
    about = _machine() | {"ids": "uniform" if zipf is None else f"zipf {zipf}", "table_bytes": parse_bytes(table_size)}
    cells = [row.cells() for row in rows]
    show(json, {"machine": about, "rows": [row.to_json() for row in rows]}, lambda: table_of(bench.HEADS, cells, about))


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
        bench.write_markdown(markdown, rows, _machine(), ratio=ratio, config=config)
    about, cells = _machine(), [row.cells() for row in rows]
    show(json, {"machine": about, "rows": [asdict(row) for row in rows]}, lambda: table_of(bench.HEADS, cells, about))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training config: its data, model and training sections.")],
    scheme: Annotated[list[str] | None, typer.Option(help="Only this scheme; may be repeated.")] = None,
    ratio: Annotated[float, typer.Option(help="Compression of the schemes that compress.")] = 16,
    rounds: Annotated[int, typer.Option(help="How often the candidates take turns.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Steps of each candidate; an epoch unless given.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the config.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Training speed of every scheme beside plain nn.Embedding: same events, model, optimiser and batches."""
    from embstore.bench import train as bench
    from embstore.schemes import SCHEMES, scheme_class
    from embstore.train.config import load_config

    for name in scheme or ():
        scheme_class(name)
    _at_least("rounds", rounds, 1)
    if steps is not None:
        _at_least("steps", steps, 1)
    names = tuple(scheme or SCHEMES)
    loaded = load_config(config, set_ or [])
    speeds = bench.measure(loaded, ratio=ratio, rounds=rounds, steps=steps, device=device, names=names)
    cells = [
        (s.name, f"{s.num_bytes:,}", f"{s.examples_per_s:,.0f}", f"{s.ratio:.2f}", f"{s.least:.2f}-{s.most:.2f}")
        for s in speeds
    ]
    heads = ("both tables", "bytes", "examples/s", f"of {bench.PLAIN}", "by round")
    about = _machine()
    show(json, {"machine": about, "rows": [asdict(s) for s in speeds]}, lambda: table_of(heads, cells, about))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name} must be at least {least}, got {value}")


def _machine() -> dict[str, str | int | float]:
    from embstore.common.machine import describe

    return describe("torch", "numba", "numpy")


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]], about: Mapping[str, object]) -> Group:
    """A table whose first column is a name and the others figures, the machine below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for row in rows:
        table.add_row(*row)
    return Group(table, Text(", ".join(f"{name} {value}" for name, value in about.items())))
