"""`embstore train`: the options and what they mean; the work is in `run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embstore.common.options import DEFAULT_STORE, JsonOption, StoreOption
from embstore.common.render import columns, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from embstore.train.publication import TrainResult


def train(
    config: Annotated[Path, typer.Argument(help="TOML file: data, task, model, tables, training.")],
    store: StoreOption = DEFAULT_STORE,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a device.")] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one key of the config, e.g. --set tables.item.scheme=memcom."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Learn user and item tables from events and publish them as one release."""
    from embstore.common.progress import make_reporter
    from embstore.publish.store import open_store
    from embstore.train.config import load_config
    from embstore.train.run import train as run

    settings = load_config(config, set_ or [])
    with make_reporter(silent=json) as report:
        result = run(settings, open_store(store), report=report, device=device)
    show(json, result.to_json(), lambda: training_table(result))


def training_table(result: TrainResult) -> RenderableType:
    """What a training run reached, and what it published."""
    from rich.console import Group

    quality = columns("test metric", ">trained", ">popularity")
    for name, value in result.metrics.items():
        quality.add_row(name, f"{value:.4f}", f"{result.popularity[name]:.4f}")
    tables = columns("table", ">version", "scheme", ">ids", ">dim", ">bytes", ">ratio")
    for name, t in result.tables.items():
        sizes = (f"{t.num_embeddings:,}", str(t.embedding_dim), f"{t.num_bytes:,}", f"{t.ratio:.1f}x")
        tables.add_row(name, str(t.version), t.scheme, *sizes)
    return Group(quality, tables, f"release {result.release}, {result.seconds:.1f} s on {result.device}")
