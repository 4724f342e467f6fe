"""The command line: every command of every package, mounted. Each imports what it needs when it runs.

How it ends, with which exit code, is in `embstore.common.command_line`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from embstore.bench.command import app as bench
from embstore.common.command_line import run
from embstore.common.render import console
from embstore.compress.command import compress
from embstore.errors import ConfigError
from embstore.publish.command import inspect, list_tables, promote, publish
from embstore.publish.lookup_command import lookup
from embstore.train.command import train, training_table
from loadtest.command import loadtest_app
from server.command import run_server, server_app

app = typer.Typer(
    name="embstore",
    help="Embedding tables in a fraction of the space: train them, publish them, serve them.",
    epilog="Start with `embstore demo`: it trains, publishes and serves. Every server flag has an "
    "environment twin, EMBSTORE_<NAME>. Exit codes: 0 ok, 1 failure, 2 usage, 3 verification failed, 4 not found, "
    "5 conflict.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run a command of this process's arguments and exit."""
    run(app)


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version of embstore.")] = False,
) -> None:
    """Without a command: the help, or the version."""
    from embstore import __version__

    if version:
        sys.stdout.write(f"embstore {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's events, config and store go.")] = Path("demo"),
    scheme: Annotated[str | None, typer.Option(help="Store both tables by this scheme, not memcom and qr.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="With --scheme: how many times smaller than plain tables. Default 2.5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated clicks.")] = 0,
    serve: Annotated[bool, typer.Option(help="Serve the tables when they are published.")] = True,
    port: Annotated[int | None, typer.Option(help="Port to serve on. Default 8000.")] = None,
) -> None:
    """Generate synthetic click data, train two compressed tables on it, publish them and serve them."""
    from embstore.common.progress import make_reporter
    from embstore.publish.store import open_store
    from embstore.schemes import scheme_class
    from embstore.train.config import load_config
    from embstore.train.demo import RATIO, curl_lines, write_demo
    from embstore.train.run import train as train_tables

    if scheme is not None:
        scheme_class(scheme)
        folder = folder / scheme
    elif ratio is not None:
        raise ConfigError("--ratio goes with --scheme")
    if ratio is not None and not 1 <= ratio < float("inf"):
        raise ConfigError(f"--ratio must be at least 1 (1 = uncompressed), got {ratio}")
    store = open_store(folder / "store")
    if store.tables():
        console().print(f"using the store in {folder / 'store'}; remove {folder} to train anew", highlight=False)
    else:
        config = load_config(write_demo(folder, seed=seed, scheme=scheme, ratio=ratio or RATIO))
        with make_reporter() as report:
            result = train_tables(config, store, report=report)
        console().print(training_table(result))
    url = f"http://127.0.0.1:{port or 8000}"
    console().print(curl_lines(store, folder, url), markup=False, highlight=False, soft_wrap=True)
    if serve:
        run_server(store=folder / "store", port=port)


app.command()(train)
app.command()(publish)
app.command()(compress)
app.add_typer(bench, name="bench")
app.add_typer(loadtest_app, name="loadtest")
app.command("list")(list_tables)
app.command()(inspect)
app.command()(promote)
app.command()(lookup)
app.add_typer(server_app)
