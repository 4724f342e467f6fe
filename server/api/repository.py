"""Open Inference Protocol (v2) beside infer requests: what models there are, which are ready, loading and unloading.

A table is a model and its version numbers are the model's; `embstore` is all tables together, its versions the
releases (`server.api.codecs.open_inference` answers for both). Calls of extensions that this server does not have get
a 404 that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from embstore import __version__
from embstore.common.atomic_files import NUMBER
from embstore.errors import BadRequest, Conflict, NotReady, ReleaseNotFound, Unprocessable
from embstore.table import Table
from server.api.codecs.open_inference import EMBEDDINGS, FOUND, IDS, OFFSETS, WEIGHTS
from server.api.labels import MAX_BYTES
from server.api.schemas import body, problems
from server.api.tables import check_started
from server.http.auth import require_admin
from server.http.body import read_body
from server.http.problems import clip
from server.http.routing import MANY
from server.tables.registry import Registry

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "system_shared_memory")
State = Literal["LOADING", "READY", "UNAVAILABLE"]
_STATES: dict[str, State] = {"loading": "LOADING", "ready": "READY", "failed": "UNAVAILABLE"}
_problems = partial(problems, model="InferProblem")


@dataclass
class ServerMetadata:
    """Name and version of the server, and the extensions of the protocol that it has."""

    name: str
    version: str
    extensions: list[str]


@dataclass
class TensorMetadata:
    """An input or output; -1 in a shape is any length."""

    name: str
    datatype: str
    shape: list[int]


@dataclass
class ModelMetadata:
    """Inputs, outputs and versions of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


@dataclass
class ModelReady:
    """A model that answers."""

    name: str
    ready: bool


@dataclass
class TensorConfig:
    """An input or output, as Triton configures it."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool | None = None


@dataclass
class ModelConfig:
    """The metadata of a model as a Triton model configuration."""

    name: str
    platform: str
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]


@dataclass
class RepositoryEntry:
    """A version of a model, and whether it serves."""

    name: str
    version: str
    state: State
    reason: str


class ModelChanged(BaseModel):
    """An empty object: the change is made."""


class RepositoryFilter(msgspec.Struct):
    """`ready`: list only models that serve."""

    ready: bool = False


class ModelChange(msgspec.Struct):
    """How to load or unload a model; no parameters are supported."""

    parameters: Annotated[dict[str, Any], msgspec.Meta(title="Parameters")] | None = None


def _version(request: Request) -> str | None:
    """The version in a path; None in a path without one."""
    return request.path_params.get("version")


Version = Annotated[str | None, Depends(_version)]
_Body = TypeVar("_Body", RepositoryFilter, ModelChange)


def repository_router(tables: Registry) -> APIRouter:
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
    @router.get("", responses=_problems())
    def show_server() -> ServerMetadata:
        """Name and version of the server, and the extensions of the protocol that it has."""
        return ServerMetadata("embstore", __version__, list(EXTENSIONS))

    @router.get("/models/{model}", responses=_problems(400, 404))
    @router.get("/models/{model}/versions/{version}", responses=_problems(400, 404))
    def show_model(model: str, version: Version) -> ModelMetadata:
        """Inputs, outputs and versions of a model."""
        return _metadata(tables, model, version)

    @router.get("/models/{model}/ready", responses=_problems(400, 404))
    @router.get("/models/{model}/versions/{version}/ready", responses=_problems(400, 404))
    def show_ready(model: str, version: Version) -> ModelReady:
        """Whether a model answers: 200, else an error that says why not."""
        _tables_of(tables, model, version)
        return ModelReady(model, True)

    @router.get("/models/{model}/config", responses=_problems(400, 404), response_model_exclude_none=True)
    @router.get(
        "/models/{model}/versions/{version}/config", responses=_problems(400, 404), response_model_exclude_none=True
    )
    def show_config(model: str, version: Version) -> ModelConfig:
        """The metadata of a model as a Triton model configuration."""
        return _config(_metadata(tables, model, version))


def _add_repository(router: APIRouter, tables: Registry) -> None:
    change: dict[str, Any] = {
        "responses": _problems(400, 403, 404, 409, 413, 422),
        "dependencies": [Depends(require_admin)],
        "openapi_extra": body("ModelChange", required=False),
    }

    @router.post(
        "/repository/index",
        responses=_problems(400, 413),
        openapi_extra=body("RepositoryFilter", required=False),
    )
    async def list_repository(request: Request) -> list[RepositoryEntry]:
        """Every model in the store with its versions known here, their states and why; `ready`: those that serve."""
        ready = _decode(await read_body(request.stream(), MAX_BYTES), RepositoryFilter).ready
        entries = await run_in_threadpool(_index, tables)
        return [entry for entry in entries if not ready or entry.state == "READY"]

    @router.post("/repository/models/{model}/load", **change)
    async def load_model(model: str, request: Request) -> ModelChanged:
        """Look at the store now and serve a table as it stands there; answers when it is served."""
        parameters = _decode(await read_body(request.stream(), MAX_BYTES), ModelChange).parameters or {}
        if parameters:
            name = clip(next(iter(parameters)))
            raise Unprocessable(f"unsupported load parameter {name} (config overrides are not supported)")
        _refuse_many(model)
        await run_in_threadpool(tables.load, model)
        return ModelChanged()

    @router.post("/repository/models/{model}/unload", **change)
    async def unload_model(model: str, request: Request) -> ModelChanged:
        """Stop serving a table until it is loaded again; answers when it is served no longer."""
        _decode(await read_body(request.stream(), MAX_BYTES), ModelChange)
        _refuse_many(model)
        await run_in_threadpool(tables.unload, model)
        return ModelChanged()


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
    check_started(tables)
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


def _metadata(tables: Registry, model: str, version: str | None) -> ModelMetadata:
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
        datatype = "BYTES" if table.ids.id_type is str else "INT64"
        inputs += [
            TensorMetadata(name, datatype, [-1]),
            TensorMetadata(prefix + OFFSETS, "INT64", [-1]),
            TensorMetadata(prefix + WEIGHTS, "FP32", [-1]),
        ]
        outputs += [
            TensorMetadata(name if prefix else EMBEDDINGS, "FP32", [-1, table.embedding_dim]),
            TensorMetadata(prefix + FOUND, "BOOL", [-1]),
        ]
    return ModelMetadata(model, versions, platform, inputs, outputs)


def _config(metadata: ModelMetadata) -> ModelConfig:
    def tensors(described: list[TensorMetadata]) -> list[TensorConfig]:
        return [
            TensorConfig(
                tensor.name,
                f"TYPE_{tensor.datatype.replace('BYTES', 'STRING')}",
                tensor.shape,
                True if tensor.name.rpartition(".")[2] in (OFFSETS, WEIGHTS) else None,
            )
            for tensor in described
        ]

    return ModelConfig(metadata.name, metadata.platform, 0, tensors(metadata.inputs), tensors(metadata.outputs))


def _index(tables: Registry) -> list[RepositoryEntry]:
    """An entry for each version known here, and for each table of the store that has none."""
    unloaded = tables.unloaded.read()
    entries = [
        RepositoryEntry(name, str(version), _STATES[status.state], status.reason)
        for (name, version), status in sorted(tables.status().items())
        if name not in unloaded and name != MANY
    ]
    known = {entry.name for entry in entries}
    for name in tables.store.tables():
        if name not in known and name != MANY:
            reason = "unloaded" if name in unloaded else "not loaded"
            entries.append(RepositoryEntry(name, str(tables.store.versions(name)[-1]), "UNAVAILABLE", reason))
    if tables.snapshot.latest:
        entries += [RepositoryEntry(MANY, release, "READY", "") for release in tables.snapshot.releases or [""]]
    return entries
