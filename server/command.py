"""`embstore serve` and `embstore config`: settings as flags, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embstore.common.options import JsonOption
from embstore.common.render import facts, show
from embstore.errors import ConfigError

server_app = typer.Typer()


@server_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    store: Annotated[Path | None, typer.Option(help="Folder of the store that is served.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default 8000.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that serve, sharing port and tables. Default 1.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default auto.")] = None,
    redis: Annotated[str | None, typer.Option(help="Redis URL, or `embedded` to start a private one.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Keep rows of hot ids ready: off, on or auto. Default auto.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. Default info.")] = None,
) -> None:
    """Serve a store over HTTP. Every setting that `embstore config` lists is a flag too, as in --max-queue 100.

    Settings not given come from EMBSTORE_<NAME>, then the file EMBSTORE_CONFIG names.
    """
    given = {"store": store, "host": host, "port": port, "workers": workers, "device": device}
    given |= {"redis": redis, "cache": cache, "log_level": log_level}
    run_server(**given, **_other_flags(context.args))


def _other_flags(arguments: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value` of settings that have no option of their own."""
    flags, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise ConfigError(f"{name!r} is not understood: settings are given as --name value")
        flags[name.removeprefix("--").replace("-", "_")] = value if equals else rest.pop(0)
    return flags


def run_server(**given: Any) -> None:
    """Serve until told to stop; settings that are None come from the environment and the file."""
    from server.process.serve import serve
    from server.settings import read_settings

    raise typer.Exit(serve(read_settings(**given)))


@server_app.command()
def config(json: JsonOption = False) -> None:
    """The server settings in effect, after environment and file, secrets left out."""
    from server.settings import read_settings, redacted

    settings = redacted(read_settings())
    show(json, settings, lambda: facts(settings | {"port": str(settings["port"])}))  # no thousands in a port
