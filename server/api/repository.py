"""Open Inference Protocol (v2) beside infer requests: what models there are, which are ready, loading and unloading.

A table is a model and its version numbers are the model's; `embstore` is all tables together, its versions the
releases (`server.api.codecs.open_inference` answers for both). Calls of extensions that this server does not have get
a 404 that says so.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from embstore import __version__
from embstore.common.atomic_files import NUMBER
from embstore.errors import BadRequest, Conflict, NotReady, ReleaseNotFound, Unprocessable
from embstore.table import Table
from server.api.codecs.open_inference import EMBEDDINGS, FOUND, IDS, OFFSETS, WEIGHTS
from server.api.labels import as_json, read_body
from server.http.auth import require_admin
from server.http.problems import clip
from server.http.routing import MANY
from server.tables.registry import Registry

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters")
_STATES = {"loading": "LOADING", "ready": "READY", "failed": "UNAVAILABLE"}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": "No such model or version"}}
_ADMIN: dict[int | str, dict[str, Any]] = {
    **_UNKNOWN,
    400: {"description": "Malformed"},
    401: {"description": "An admin key is needed"},
    403: {"description": "The key is for lookups alone, or changes are off here"},
    409: {"description": "All tables together cannot be loaded or unloaded"},
    413: {"description": "Too many bytes"},
    422: {"description": "A parameter is not supported"},
    503: {"description": "The model cannot be served, and why"},
}


class _Index(msgspec.Struct):
    ready: bool = False


class _Change(msgspec.Struct):
    parameters: dict[str, Any] | None = None


_Body = TypeVar("_Body", _Index, _Change)


def v2_router(tables: Registry) -> APIRouter:
    """Everything under /v2 that FastAPI answers."""
    router = APIRouter(prefix="/v2", tags=["open inference"])
    _add_models(router, tables)
    _add_repository(router, tables)

    return router


def unsupported(path: str) -> str:
    """What to tell the caller of an extension that is not here."""
    return (
        f"{path} is not supported: beside inference, metadata and health there are the extensions "
        f"{', '.join(EXTENSIONS)}; statistics are at /metrics"
    )


def _add_models(router: APIRouter, tables: Registry) -> None:
    @router.get("")
    def show_server() -> Response:
        """Name and version of the server, and the extensions of the protocol that it has."""
        return as_json({"name": "embstore", "version": __version__, "extensions": EXTENSIONS})

    @router.get("/models/{model}", responses=_UNKNOWN)
    @router.get("/models/{model}/versions/{version}", responses=_UNKNOWN)
    def show_model(model: str, version: str | None = None) -> Response:
        """Inputs, outputs and versions of a model."""
        described = _describe(tables, model, version)
        return as_json(described)

    @router.get("/models/{model}/ready", responses=_UNKNOWN)
    @router.get("/models/{model}/versions/{version}/ready", responses=_UNKNOWN)
    def show_ready(model: str, version: str | None = None) -> Response:
        """Whether a model answers: 200, else an error that says why not."""
        _tables_of(tables, model, version)
        return as_json({"name": model, "ready": True})

    @router.get("/models/{model}/config", responses=_UNKNOWN)
    @router.get("/models/{model}/versions/{version}/config", responses=_UNKNOWN)
    def show_config(model: str, version: str | None = None) -> Response:
        """The same as the metadata, in the words of a Triton model configuration."""
        described = _describe(tables, model, version)

        def tensors(kind: str) -> list[dict[str, Any]]:
            return [
                {"name": t["name"], "data_type": f"TYPE_{t['datatype'].replace('BYTES', 'STRING')}", "dims": t["shape"]}
                | ({"optional": True} if t["name"].rpartition(".")[2] in (OFFSETS, WEIGHTS) else {})
                for t in described[kind]
            ]

        return as_json(
            {
                "name": model,
                "platform": described["platform"],
                "max_batch_size": 0,
                "input": tensors("inputs"),
                "output": tensors("outputs"),
            }
        )


def _add_repository(router: APIRouter, tables: Registry) -> None:
    @router.post("/repository/index", responses={400: _ADMIN[400], 413: _ADMIN[413]})
    async def list_repository(request: Request) -> Response:
        """Every model in the store with its versions known here, their states and why; `ready`: those that serve."""
        ready = _decode(await read_body(request), _Index).ready
        entries = await run_in_threadpool(_index, tables)
        return as_json([entry for entry in entries if not ready or entry["state"] == "READY"])

    @router.post("/repository/models/{model}/load", responses=_ADMIN, dependencies=[Depends(require_admin)])
    async def load_model(model: str, request: Request) -> Response:
        """Look at the store now and serve a table as it stands there; answers when it is served."""
        parameters = _decode(await read_body(request), _Change).parameters or {}
        if parameters:
            raise Unprocessable(
                f"parameter {clip(next(iter(parameters)))} is not supported: a table is as it is stored"
            )
        _refuse_many(model)
        await run_in_threadpool(tables.load, model)
        return as_json({})

    @router.post("/repository/models/{model}/unload", responses=_ADMIN, dependencies=[Depends(require_admin)])
    async def unload_model(model: str, request: Request) -> Response:
        """Stop serving a table until it is loaded again; answers when it is served no longer."""
        _decode(await read_body(request), _Change)
        _refuse_many(model)
        await run_in_threadpool(tables.unload, model)
        return as_json({})


def _decode(body: bytes, kind: type[_Body]) -> _Body:
    """A body of JSON; nothing at all says nothing."""
    try:
        return msgspec.json.decode(body.strip() or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"body: {error}") from error


def _refuse_many(model: str) -> None:
    if model == MANY:
        raise Conflict(f"model {MANY!r} is all tables together: load or unload the tables")


def _tables_of(tables: Registry, model: str, version: str | None) -> dict[str, Table]:
    """The tables that a model answers from; an error when it does not."""
    if not tables.started:
        raise NotReady("tables are still being loaded")
    snapshot = tables.snapshot
    if version is not None and not NUMBER.fullmatch(version):
        raise BadRequest(f"version {clip(version)} is not a version number")
    if model != MANY:
        return {IDS: snapshot.table(model, version=None if version is None else int(version))}
    if version is not None and version not in snapshot.releases:
        raise ReleaseNotFound(version, f"; loaded are {', '.join(snapshot.releases) or 'none'}")
    served = snapshot.latest if version is None else snapshot.releases[version]
    if not served:
        raise NotReady("no table is being served")
    return dict(sorted(served.items()))


def _describe(tables: Registry, model: str, version: str | None) -> dict[str, Any]:
    """A model's metadata."""
    served = _tables_of(tables, model, version)
    snapshot = tables.snapshot
    if model == MANY:
        versions, platform = list(snapshot.releases), "embstore"
    else:
        versions = [str(n) for name, n in sorted(snapshot.loaded) if name == model]
        platform = f"embstore_{served[IDS].scheme.name}"
    inputs, outputs = [], []
    for name, table in served.items():
        prefix = "" if model != MANY else f"{name}."
        datatype = "BYTES" if table.ids.key_type is str else "INT64"
        inputs += [
            _tensor(name, datatype, -1),
            _tensor(prefix + OFFSETS, "INT64", -1),
            _tensor(prefix + WEIGHTS, "FP32", -1),
        ]
        outputs += [
            _tensor(name if prefix else EMBEDDINGS, "FP32", -1, table.embedding_dim),
            _tensor(prefix + FOUND, "BOOL", -1),
        ]
    return {"name": model, "versions": versions, "platform": platform, "inputs": inputs, "outputs": outputs}


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _index(tables: Registry) -> list[dict[str, str]]:
    """An entry for each version known here, and for each table of the store that has none."""
    withheld = tables.withheld.read()
    entries = [
        _entry(name, str(version), _STATES[status.state], status.reason)
        for (name, version), status in sorted(tables.status().items())
        if name not in withheld and name != MANY
    ]
    known = {entry["name"] for entry in entries}
    for name in tables.store.tables():
        if name not in known and name != MANY:
            reason = "unloaded" if name in withheld else "not loaded"
            entries.append(_entry(name, str(tables.store.versions(name)[-1]), "UNAVAILABLE", reason))
    if tables.snapshot.latest:
        entries += [_entry(MANY, release, "READY", "") for release in tables.snapshot.releases or [""]]
    return entries


def _entry(name: str, version: str, state: str, reason: str) -> dict[str, str]:
    return {"name": name, "version": version, "state": state, "reason": reason}
