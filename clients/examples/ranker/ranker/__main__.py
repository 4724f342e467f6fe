"""The command line: `python -m ranker train | serve | evaluate`."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Annotated

import httpx
import typer

from ranker.artifact import ArtifactError, load
from ranker.settings import SettingsError, read_settings

app = typer.Typer(
    name="ranker",
    help="A ranking service that fetches its vectors from embstore. Every flag of `serve` has an environment twin, "
    "RANKER_<NAME>.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ArtifactOption = Annotated[Path, typer.Option(help="Folder of the ranker's artifact.")]
DEMO = Path("demo/ranker")


def main() -> None:
    """Run a command; what can be explained becomes one line and exit code 1."""
    try:
        app()
    except (ArtifactError, SettingsError, httpx.HTTPError, OSError) as error:
        sys.stderr.write(f"ranker: {error}\n")
        sys.exit(1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The config that `embstore train` made the release by.")],
    store: Annotated[Path, typer.Option(help="Folder of the store.")],
    artifact: ArtifactOption = DEMO,
    release: Annotated[str | None, typer.Option(help="Release to pin. Default: the newest.")] = None,
) -> None:
    """Learn a ranker for a release, and write it with the lists that it was tested by."""
    import torch

    import embstore
    from embstore.errors import EmbstoreError
    from embstore.train.config import load_config
    from ranker.train import Options
    from ranker.train import train as run

    torch.set_num_threads(1)  # the model is small: threads would wait for each other
    try:
        trained = run(load_config(config), embstore.open_store(store), artifact, release, Options(), typer.echo)
    except EmbstoreError as error:
        raise ArtifactError(str(error)) from error
    typer.echo(f"wrote {artifact}, pinned to release {trained.release}")


@app.command()
def serve(
    artifact: Annotated[Path | None, typer.Option(help="Folder of the artifact. Default demo/ranker.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="URL of the embedding service, or several with commas.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default 8100.")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="How long a ranking waits for vectors. Default 50.")] = None,
    probe_seconds: Annotated[float | None, typer.Option(help="How often the release is looked at. Default 1.")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Most candidates in a request. Default 500.")] = None,
) -> None:
    """Rank over HTTP until a signal."""
    import torch
    import uvicorn

    from ranker.service import create_app

    settings = read_settings(
        artifact=artifact,
        embeddings=embeddings,
        host=host,
        port=port,
        deadline_ms=deadline_ms,
        probe_seconds=probe_seconds,
        max_candidates=max_candidates,
    )
    torch.set_num_threads(1)  # 500 candidates are less work than waking a thread
    trained = load(settings.artifact)
    try:
        service = create_app(trained, settings)
    except ValueError as error:
        raise SettingsError(f"embeddings: {error}") from error
    listener = socket.create_server((settings.host, settings.port), backlog=2048)
    url = f"http://{settings.host}:{listener.getsockname()[1]}"
    typer.echo(f"ranking on {url} by vectors of {settings.embeddings}", err=True)
    uvicorn.Server(uvicorn.Config(service, log_level="warning", access_log=False)).run(sockets=[listener])


@app.command()
def evaluate(
    url: Annotated[str, typer.Argument(help="Where the ranker serves.")] = "http://127.0.0.1:8100",
    artifact: ArtifactOption = DEMO,
) -> None:
    """Rank the test's lists over HTTP and show the figures beside those of training."""
    from ranker.evaluate import over_http
    from ranker.lists import read_lists
    from ranker.train import EVALUATION

    trained = load(artifact)
    found = over_http(url, read_lists(artifact / EVALUATION), trained.release, trained.evaluation["cutoff"])
    offline = {name: trained.metrics[name] for name in found}
    typer.echo(json.dumps({"over_http": found, "offline": offline, "equal": found == offline}, indent=2))
    if found != offline:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
