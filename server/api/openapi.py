"""The OpenAPI document: FastAPI's own, with the calls that are answered before FastAPI sees them.

Bodies are described by the types that decode them, replies by the models in `server.api.schemas`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from embstore.pooling import POOLINGS
from embstore.table import ON_MISSING
from server.api.codecs.json_body import LookupBody, ManyBody
from server.api.codecs.vectors import DTYPES
from server.api.labels import LabelMove
from server.api.repository import ModelChange, RepositoryFilter
from server.api.schemas import ERRORS, MODELS, REF, content, problems, ref
from server.api.system_shared_memory import Registration
from server.http.messages import MAX_TIMEOUT_MS
from server.http.problems import KINDS

TITLE = "embstore API"
"""Generators name a client after it, and `embstore_client` is the name of one that exists."""
TEXT = {"type": "string"}
_REPLY_HEADERS = {
    "X-Embedding-Version": "Version that answered.",
    "X-Embedding-Shape": "Rows and columns: n,d; n is ids, or bags.",
    "X-Embedding-Dtype": "Type of the numbers.",
    "X-Embedding-Missing": "Number of ids the table does not have.",
    "X-Embedding-Release": "Release the version belongs to, where it does.",
    "X-Request-ID": "The request's id, echoed or made.",
    "Server-Timing": "Milliseconds of each stage, when `X-Timing: 1` asks for them.",
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Required where the server has API keys."},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key in another place."},
}
_BODIES = (LookupBody, ManyBody, LabelMove, RepositoryFilter, ModelChange, Registration)
"""What decodes bodies; a name that ends in Body has none of that in the document."""
_ENUMS: dict[str, Any] = {
    "OnMissing": {
        "type": "string",
        "enum": list(ON_MISSING),
        "description": "What ids get that the table does not have: zeros (when left out), the table's default vector, "
        "an error (422), or the vector of another row, always the same one.",
    },
    "Dtype": {
        "type": "string",
        "enum": list(DTYPES),
        "description": "Type of the numbers, float32 when left out. int8 rows are bytes: they come only where the "
        "reply is an octet-stream.",
    },
    "ProblemCode": {"type": "string", "enum": sorted(KINDS), "description": "What went wrong, for programs."},
}
_LOOKUP_FIELDS: dict[str, Any] = {
    "ids": {"description": "Integers or decimal strings; for a table with string ids, its strings."},
    "on_missing": ref("OnMissing"),
    "dtype": ref("Dtype"),
    "found": {"description": "Return `found` even when all were."},
    "offsets": {
        "description": "Where in `ids` each bag starts: the first at 0, none less than the one before, none past the "
        "end; the last bag ends with the ids. The reply has one vector per bag.",
    },
    "pooling": {
        "anyOf": [{"type": "string", "title": "Pooling", "enum": list(POOLINGS)}, {"type": "null"}],
        "description": "How the vectors of a bag become one. An empty bag is zeros; a missing id is left out under "
        "on_missing `zero`.",
    },
    "weights": {
        "description": "One for each id, for `sum`, and for `mean` (none below 0), which is then sum(w e) / sum(w); "
        "`max` takes none.",
    },
}
"""What the type of a body does not say."""


_PARAMETERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "table": ("path", TEXT, "Name of the table."),
    "version": ("path", {"type": "integer", "minimum": 1}, "A loaded version."),
    "label": ("path", TEXT, "A label of the table."),
    "release": ("path", TEXT, "A loaded release."),
    "region": ("path", TEXT, "Name of a region of shared memory."),
    "model": ("path", TEXT, "Name of a table; `embstore` for many tables at once."),
    # no defaults here: generated clients would send them with JSON bodies, which have their own
    "on_missing": ("query", ref("OnMissing"), "For octet-stream bodies; JSON has it in the body."),
    "dtype": ("query", ref("Dtype"), "For octet-stream bodies; JSON has it in the body."),
    "X-Timing": ("header", TEXT, "`1` asks for Server-Timing in the reply."),
    "Inference-Header-Content-Length": (
        "header",
        {"type": "integer", "minimum": 0},
        "Bytes of JSON at the start of an octet-stream body; 0 for a body of int64 ids alone.",
    ),
    "X-Request-ID": ("header", TEXT, "Up to 128 printable ASCII characters; comes back in the reply."),
    "X-Request-Timeout-Ms": (
        "header",
        {"type": "integer", "minimum": 0, "maximum": MAX_TIMEOUT_MS},
        "How long the caller waits; work that would come later is dropped (504).",
    ),
}
_TENSORS = "A JSON object, then the bytes of the binary tensors in its order."


class _Call(NamedTuple):
    """One kind of lookup."""

    tag: str
    summary: str
    body: dict[str, Any]
    returns: str
    reply: dict[str, Any]
    headers: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    problem: str = "Problem"

    def at(self, path: str, operation: str) -> dict[str, Any]:
        """This lookup as a POST to a path."""
        headers = {name: {"description": _REPLY_HEADERS[name], "schema": TEXT} for name in self.headers}
        errors = problems(*(ERRORS.keys() - {409}), model=self.problem)
        call = {
            "operationId": operation,
            "tags": [self.tag],
            "summary": self.summary,
            "parameters": _parameters(path, *self.parameters, "X-Request-ID", "X-Request-Timeout-Ms"),
            "requestBody": {"required": True, "content": self.body},
            "responses": {"200": {"description": self.returns, "headers": headers, "content": self.reply}}
            | {str(status): reply for status, reply in errors.items()},
        }
        return {"post": call}


_ONE = _Call(
    "lookup",
    "Vectors of ids of one table",
    content("Lookup", "Little-endian int64 ids."),
    "One row per id, in the order of the ids, or one per bag where there are `offsets`. JSON is answered in JSON, or "
    "with binary rows when it says `Accept: application/octet-stream`.",
    content(
        "LookupReply",
        "Row-major little-endian rows of `dtype`; int8 rows are codes, then a float32 scale and a float32 bias. Where "
        "ids were missing, found bits follow the rows, one per id (bit i of byte i // 8, least significant first).",
    ),
    tuple(_REPLY_HEADERS),
    ("on_missing", "dtype", "X-Timing"),
)
_MANY = _Call(
    "lookup",
    "Vectors of ids of many tables, all from one release",
    content("ManyLookup"),
    "One entry per table.",
    content("ManyLookupReply"),
    ("X-Embedding-Release", "X-Request-ID"),
)
_INFER = _Call(
    "open inference",
    "Vectors by the Open Inference Protocol",
    content("InferRequest", _TENSORS),
    "The outputs asked for, as JSON or as binary tensors.",
    content("InferReply", _TENSORS),
    ("X-Request-ID",),
    ("Inference-Header-Content-Length",),
    "InferProblem",
)
_LOOKUPS = {
    "/v1/tables/{table}/lookup": (_ONE, "lookup"),
    "/v1/tables/{table}/versions/{version}/lookup": (_ONE, "lookup_version"),
    "/v1/tables/{table}/labels/{label}/lookup": (_ONE, "lookup_label"),
    "/v1/lookup": (_MANY, "lookup_many"),
    "/v1/releases/{release}/lookup": (_MANY, "lookup_release"),
    "/v2/models/{model}/infer": (_INFER, "infer"),
    "/v2/models/{model}/versions/{version}/infer": (_INFER, "infer_version"),
}
_PROBES = {
    "/livez": ("livez", "operations", "The process runs and answers"),
    "/startupz": ("startupz", "operations", "The store was looked at for the first time"),
    "/readyz": (
        "readyz",
        "operations",
        "Traffic is welcome: every table has just answered a lookup with the right vectors",
    ),
    "/v2/health/live": ("server_live", "open inference", "The same as /livez"),
    "/v2/health/ready": ("server_ready", "open inference", "The same as /readyz"),
}


def _parameters(path: str, *others: str) -> list[dict[str, Any]]:
    """The parameters in a path, and others."""
    found = [(name, *_PARAMETERS[name]) for name in (*re.findall(r"{(\w+)}", path), *others)]
    return [
        {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}
        for name, where, schema, description in found
    ]


def _probe(operation: str, tag: str, summary: str) -> dict[str, Any]:
    """A GET that needs no API key."""
    replies = {"200": {"description": "Yes.", "content": content("Health")}}
    if not operation.endswith(("livez", "live")):
        replies["503"] = {"description": "No, and why.", "content": content("Health")}
    call = {"operationId": operation, "tags": [tag], "summary": summary, "security": [], "responses": replies}
    return {"get": call}


def document(api: FastAPI) -> None:
    """Make `/openapi.json` describe every call of the server, made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _complete(
                get_openapi(title=TITLE, version=api.version, summary=api.summary, routes=api.routes)
            )
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with the lookups, and without the errors of a validation that never takes place."""
    for path, calls in document["paths"].items():
        for call in calls.values():
            call["parameters"] = _parameters(path)
            if "HTTPValidationError" in str(call["responses"].get("422")):
                del call["responses"]["422"]
    document["paths"] |= {path: call.at(path, operation) for path, (call, operation) in _LOOKUPS.items()}
    document["paths"] |= {path: _probe(*probe) for path, probe in _PROBES.items()}
    document["security"] = [{}, *({name: []} for name in _SECURITY)]
    document["components"]["securitySchemes"] = _SECURITY
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= _schemas()
    return document


def _schemas() -> dict[str, Any]:
    """Bodies and replies of the calls that FastAPI does not see."""
    _, models = models_json_schema([(model, "validation") for model in MODELS], ref_template=REF)
    _, components = msgspec.json.schema_components(_BODIES, ref_template=REF.format(model="{name}"))
    bodies = msgspec.json.decode(re.sub(rb'Body(?=")', b"", msgspec.json.encode(components)))
    lookup, many = bodies["Lookup"], bodies.pop("Many")
    for name, said in _LOOKUP_FIELDS.items():
        lookup["properties"][name] = said if "$ref" in said else lookup["properties"][name] | said
    lookup["examples"] = [
        {"ids": [3, 7], "on_missing": "zero"},
        {"ids": [3, 7, 7, 9], "offsets": [0, 3], "pooling": "mean"},
    ]
    lookup["dependentRequired"] = {"offsets": ["pooling"], "pooling": ["offsets"], "weights": ["offsets", "pooling"]}
    many["properties"]["tables"] |= {"minProperties": 1, "description": "A lookup for each table, by its name."}
    many["title"] = "ManyLookup"
    schemas: dict[str, Any] = models["$defs"] | bodies | {"ManyLookup": many} | _ENUMS
    for problem in ("Problem", "InferProblem"):
        schemas[problem]["properties"]["code"] = ref("ProblemCode")
    return schemas
