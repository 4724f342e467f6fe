"""`embstore serve` and `embstore config`: settings as flags, and what they come to."""

from __future__ import annotations

from typing import Any

import typer

from embstore.common.options import JsonOption
from embstore.common.render import facts, show
from server.flags import SettingsCommand

server_app = typer.Typer()


@server_app.command(cls=SettingsCommand)
def serve(context: typer.Context) -> None:
    """Serve a store over HTTP.

    Settings not given come from EMBSTORE_<NAME>, then the file EMBSTORE_CONFIG names.
    """
    run_server(**context.obj)


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
