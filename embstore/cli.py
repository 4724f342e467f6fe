"""The command line: every command reads top to bottom here and imports what it needs when it runs.

Exit codes: 0 ok, 1 failure, 2 usage, 3 verification failed, 4 not found, 5 conflict.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embstore.bench.command import app as bench
from embstore.common.render import console, curl_lines, facts, listing, moved_line, show, training_table, vectors_table
from embstore.compress.command import compress
from embstore.errors import ConfigError, Conflict, EmbstoreError, NotFound, VerificationFailed
from loadtest.command import loadtest_app
from server.flags import SettingsCommand

if TYPE_CHECKING:
    from embstore.publish import Store

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

StoreOption = Annotated[Path, typer.Option("--store", envvar="EMBSTORE_STORE", help="Folder of the store.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]
DEFAULT_STORE = Path("store")
TableArgument = Annotated[str, typer.Argument(help="Name of the table.")]
VersionOption = Annotated[str, typer.Option("--version", help="A version number or a label.")]


def main() -> None:
    """Run a command; errors of ours become one readable line and their exit code."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except EmbstoreError as error:
        fail(str(error), exit_code(error))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a usage error; its text names the flag
            fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)  # empty after help
        raise


def exit_code(error: EmbstoreError) -> int:
    """The exit code of an error."""
    for kind, code in ((ConfigError, 2), (VerificationFailed, 3), (NotFound, 4), (Conflict, 5)):
        if isinstance(error, kind):
            return code
    return 1


def fail(message: str, code: int) -> None:
    """One line on stderr, then out."""
    if message:
        sys.stderr.write(f"embstore: {' '.join(message.split())}\n")
    sys.exit(code)


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
    """Make clicks with planted structure, train two compressed tables on them, publish them and serve them."""
    import embstore
    from embstore.common.progress import make_reporter
    from embstore.schemes import scheme_class
    from embstore.train.config import load_config
    from embstore.train.demo import RATIO, write_demo
    from embstore.train.run import train as run_training

    if scheme is not None:
        scheme_class(scheme)
        folder = folder / scheme
    elif ratio is not None:
        raise ConfigError("--ratio goes with --scheme")
    if ratio is not None and not 1 <= ratio < float("inf"):
        raise ConfigError(f"--ratio must be at least 1 (1 = uncompressed), got {ratio}")
    store = embstore.open_store(folder / "store")
    if store.tables():
        console().print(f"using the store in {folder / 'store'}; remove {folder} to train anew", highlight=False)
    else:
        config = load_config(write_demo(folder, seed=seed, scheme=scheme, ratio=ratio or RATIO))
        with make_reporter() as report:
            result = run_training(config, store, report=report)
        console().print(training_table(result))
    url = f"http://127.0.0.1:{port or 8000}"
    console().print(curl_lines(store, folder, url), markup=False, highlight=False, soft_wrap=True)
    if serve:
        run_server(store=folder / "store", port=port)


@app.command()
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
    import embstore
    from embstore.common.progress import make_reporter
    from embstore.train.config import load_config
    from embstore.train.run import train as run_training

    settings = load_config(config, set_ or [])
    with make_reporter(silent=json) as report:
        result = run_training(settings, embstore.open_store(store), report=report, device=device)
    show(json, result.to_json(), lambda: training_table(result))


@app.command()
def publish(
    table: TableArgument,
    file: Annotated[Path, typer.Argument(help="Vectors: .npy, .safetensors, or .parquet of ids and lists.")],
    store: StoreOption = DEFAULT_STORE,
    dtype: Annotated[
        str, typer.Option(help="How rows are stored: float32, float16, bfloat16, int8 or int4.")
    ] = "float32",
    label: Annotated[str, typer.Option(help="Label to move to the new version.")] = "latest",
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Publish without moving any label.")] = False,
    new_id_type: Annotated[
        bool, typer.Option("--new-id-type", help="Move the label even from string ids to integers, or back.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Publish a file of vectors as a new version of a table."""
    import embstore

    opened, moved = embstore.open_store(store), None if no_promote else label
    before = opened.labelled(table, moved) if moved else None
    version = opened.publish(table, file, label=moved, dtype=dtype, new_id_type=new_id_type)
    dim, dim_before = opened.manifest(table, version).embedding_dim, before.embedding_dim if before else None
    show(
        json,
        {
            "table": table,
            "version": version,
            "label": moved,
            "embedding_dim": dim,
            "embedding_dim_before": dim_before,
        },
        lambda: f"published {table} version {version}{moved_line(moved, dim, dim_before)}",
    )


app.command()(compress)
app.add_typer(bench, name="bench")
app.add_typer(loadtest_app, name="loadtest")


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Tables of a store with their versions, labels and sizes, and its releases."""
    from embstore.store.local import FileStore

    files = FileStore(store)
    tables = []
    for name in files.tables():
        labels = files.labels(name)
        for version in files.versions(name):
            try:
                manifest = files.manifest(name, version)
            except VerificationFailed as error:
                tables.append({"table": name, "version": version, "error": str(error)})
                continue
            tables.append(
                {
                    "table": name,
                    "version": version,
                    "labels": sorted(label for label, at in labels.items() if at.version == version),
                    "scheme": manifest.scheme,
                    "ids": manifest.num_ids,
                    "dim": manifest.embedding_dim,
                    "num_bytes": manifest.num_bytes,
                    "created": manifest.created,
                }
            )
    releases = [{"release": r.id, "tables": r.tables, "created": r.created} for r in files.releases()]
    none = f"no tables in the store {files.root.absolute()}" if files.exists() else _no_store(files.root)
    show(json, {"versions": tables, "releases": releases}, lambda: listing(tables, releases) if tables else none)


def _no_store(root: Path) -> str:
    return f"there is no store {root.absolute()}: no such folder; --store or EMBSTORE_STORE names another"


def _opened(store: Path) -> Store:
    """A store to read from; NotFound when its folder is not there."""
    import embstore

    opened = embstore.open_store(store)
    if not opened.exists():
        raise NotFound(_no_store(opened.root))
    return opened


@app.command()
def inspect(
    table: TableArgument,
    version: VersionOption = "latest",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Everything about one version: scheme, sizes, ids, digests, training metrics. Verifies every byte."""
    loaded = _opened(store).load(table, version)
    manifest = loaded.manifest
    assert manifest is not None
    full = 4 * manifest.num_embeddings * manifest.embedding_dim
    scheme_bytes = sum(int(t.nbytes) for t in loaded.tensors.values())
    about: dict[str, Any] = {
        "table": manifest.table,
        "version": manifest.version,
        "scheme": manifest.scheme,
        "parameters": manifest.parameters,
        "num_embeddings": manifest.num_embeddings,
        "embedding_dim": manifest.embedding_dim,
        "dtype": manifest.dtype,
        "id_space": manifest.id_space,
        "num_ids": manifest.num_ids,
        "scheme_bytes": scheme_bytes,
        "full_bytes": full,
        "ratio": round(full / scheme_bytes, 2),
        "id_space_bytes": loaded.ids.num_bytes(),
        "id_space_bytes_per_id": round(loaded.ids.num_bytes() / manifest.num_ids, 2),
        "file_bytes": manifest.num_bytes,
        "files": {file.name: file.sha256 for file in manifest.files},
        "golden_ids": len(manifest.golden.ids),
        "hot_ids": len(manifest.hot_ids),
        "parent": manifest.parent,
        "created": manifest.created,
        "metrics": manifest.metrics,
        "verified": True,
    }
    show(json, about, lambda: facts(about))


@app.command()
def promote(
    table: TableArgument,
    version: Annotated[str, typer.Argument(help="A version number or another label.")],
    label: Annotated[str, typer.Option(help="The label to move.")] = "latest",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Verify a version and point a label at it; servers that watch the store follow."""
    opened = _opened(store)
    number = opened.load(table, version).version
    with opened.turn():
        opened.set_label(table, label, number)
    show(
        json,
        {"table": table, "label": label, "version": number},
        lambda: f"label {label} of {table} points at version {number}",
    )


@app.command(cls=SettingsCommand)
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


@app.command()
def config(json: JsonOption = False) -> None:
    """The server settings in effect, after environment and file, secrets left out."""
    from server.settings import read_settings, redacted

    settings = redacted(read_settings())
    show(json, settings, lambda: facts(settings | {"port": str(settings["port"])}))  # no thousands in a port


@app.command()
def lookup(
    table: TableArgument,
    ids: Annotated[list[str], typer.Argument(help="Ids as the table has them; put -- before negative ones.")],
    store: Annotated[Path | None, typer.Option(help="Read this store directly, without a server.")] = None,
    url: Annotated[
        str, typer.Option(help="Ask a server, by http://, https:// or unix:///path, unless --store is given.")
    ] = "http://127.0.0.1:8000",
    version: VersionOption = "latest",
    on_missing: Annotated[str, typer.Option(help="zero, default, error or hash.")] = "zero",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File whose first line that is no comment is the API key; or set EMBSTORE_API_KEY."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Look ids up, in a running server or directly in a store."""
    if store is None:
        rows, found, number = _lookup_over_http(url, _api_key(api_key_file), table, ids, version, on_missing)
    elif api_key_file is not None:
        raise ConfigError("--api-key-file is for a server, --store reads without one: leave one of them out")
    else:
        rows, found, number = _lookup_in_store(store, table, ids, version, on_missing)
    about = {"table": table, "version": number, "vectors": rows, "found": found}
    show(json, about, lambda: vectors_table(table, number, ids, rows, found))


def _lookup_in_store(store: Path, table: str, ids: list[str], version: str, on_missing: str) -> Any:
    loaded = _opened(store).load(table, version)
    keys = ids if loaded.ids.key_type is str else _integers(table, ids)
    vectors, found = loaded.lookup(keys, return_found=True, on_missing=on_missing)
    return vectors.tolist(), found.tolist(), loaded.version


def _api_key(file: Path | None) -> str | None:
    """The key for a server: of the file, else of EMBSTORE_API_KEY, else none; ConfigError when it cannot be sent."""
    where, key = "EMBSTORE_API_KEY", os.environ.get("EMBSTORE_API_KEY", "").strip()
    if file is not None:
        where = f"--api-key-file {file}"
        try:
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
        key = next((line for line in lines if line and not line.startswith("#")), "")
        if not key:
            raise ConfigError(f"{where}: there is no key in it")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{where}: a key is made of printable ASCII characters")
    return key or None


def _lookup_over_http(url: str, key: str | None, table: str, ids: list[str], version: str, on_missing: str) -> Any:
    from urllib.parse import unquote

    import httpx

    ref = "" if version == "latest" else f"/versions/{version}" if version.isdecimal() else f"/labels/{version}"
    body = {"ids": ids, "on_missing": on_missing, "found": True}
    try:
        headers = {"x-api-key": key} if key else {}
        uds = unquote(url.removeprefix("unix://")) if url.startswith("unix://") else None
        base = url if uds is None else "http://localhost"
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds) if uds else None, timeout=10) as client:
            reply = client.post(f"{base}/v1/tables/{table}{ref}/lookup", json=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EmbstoreError(f"no answer from {url}: {error}; is the server running?") from error
    try:
        answer = reply.json()
        if reply.status_code == 200:
            return answer["vectors"], answer["found"], answer["version"]
        detail = str(answer["detail"])
    except (ValueError, KeyError, TypeError) as error:
        raise EmbstoreError(f"{url} answers {reply.status_code}, but not as an embstore server does") from error
    if reply.status_code == 401:
        detail += "; --api-key-file or EMBSTORE_API_KEY gives one"
    raise (NotFound if reply.status_code == 404 else EmbstoreError)(detail)


def _integers(table: str, ids: list[str]) -> list[int]:
    for text in ids:
        if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(1 << 63) <= int(text) < 1 << 63:
            raise ConfigError(f"table {table!r} has 64-bit integer ids, got {text!r}")
    return [int(text) for text in ids]
