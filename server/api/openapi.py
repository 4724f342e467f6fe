"""The OpenAPI document: FastAPI's own, with the calls that are answered before FastAPI sees them."""

from __future__ import annotations

from typing import Any

from server.api.codecs.vectors import OCTET_STREAM
from server.api.openapi_schemas import POSITIVE, SCHEMAS, TEXT
from server.http.messages import MAX_TIMEOUT_MS

_JSON = "application/json"
_PROBLEM = "application/problem+json"
_V2 = "open inference"
_FASTAPI_ONLY = ("HTTPValidationError", "ValidationError")

TITLE = "embstore API"
"""Generators name a client after it, and `embstore_client` is the name of one that exists."""
ERRORS = {
    400: "Malformed",
    401: "An API key is needed",
    403: "Not allowed here",
    404: "No such table, version, label or release",
    409: "In conflict with what is served",
    413: "Too many ids or bytes",
    415: "Unsupported media type or coding",
    422: "An id out of range, or a value that is not allowed",
    429: "Overloaded: no room for another request now",
    503: "Not ready, or shutting down",
    504: "The time of X-Request-Timeout-Ms was over",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_REPLY_HEADERS = {
    "X-Embedding-Version": "Version that answered.",
    "X-Embedding-Shape": "Rows and columns: n,d; n is ids, or bags.",
    "X-Embedding-Dtype": "Type of the numbers.",
    "X-Embedding-Missing": "How many ids the table does not have.",
    "X-Embedding-Release": "Release the version belongs to, where it does.",
    "X-Request-ID": "The request's id, echoed or made.",
    "Server-Timing": "Milliseconds of each stage, when `X-Timing: 1` asks for them.",
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Needed where the server has keys."},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key in another place."},
}


def _parameter(name: str, where: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}


_TABLE = _parameter("table", "path", TEXT, "Name of the table.")
_VERSION = _parameter("version", "path", POSITIVE, "A loaded version.")
_LABEL = _parameter("label", "path", TEXT, "A label of the table.")
_RELEASE = _parameter("release", "path", TEXT, "A loaded release.")
_MODEL = _parameter("model", "path", TEXT, "Name of a table; `embstore` for many tables at once.")
_IN_PATHS = {parameter["name"]: parameter for parameter in (_TABLE, _VERSION, _LABEL, _RELEASE, _MODEL)}
_REQUEST_HEADERS = [
    _parameter("X-Request-ID", "header", TEXT, "Up to 128 printable ASCII characters; comes back in the reply."),
    _parameter(
        "X-Request-Timeout-Ms",
        "header",
        {"type": "integer", "minimum": 0, "maximum": MAX_TIMEOUT_MS},
        "How long the caller waits; work that would come later is dropped (504).",
    ),
]
_TIMING = _parameter("X-Timing", "header", TEXT, "`1` asks for Server-Timing in the reply.")
_JSON_LENGTH = _parameter(
    "Inference-Header-Content-Length",
    "header",
    {"type": "integer", "minimum": 0},
    "Bytes of JSON at the start of an octet-stream body; 0 for a body of int64 ids alone.",
)


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


_OPTIONS = [  # no defaults here: generated clients would send them with JSON bodies, which have their own
    _parameter("on_missing", "query", _ref("OnMissing")["schema"], "For octet-stream bodies; JSON has it in the body."),
    _parameter("dtype", "query", _ref("Dtype")["schema"], "For octet-stream bodies; JSON has it in the body."),
]


def _bytes(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary", "description": description}}


def _problem(status: int, schema: str = "Problem") -> dict[str, Any]:
    """The reply that tells of an error."""
    reply: dict[str, Any] = {"description": ERRORS[status], "content": {_PROBLEM: _ref(schema)}}
    return reply | {"headers": _RETRY_AFTER} if status in (429, 503) else reply


def _errors(*without: int, schema: str = "Problem") -> dict[str, Any]:
    return {str(status): _problem(status, schema) for status in ERRORS if status not in without}


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"description": _REPLY_HEADERS[name], "schema": TEXT} for name in names}


def _call(
    operation: str,
    summary: str,
    tag: str,
    parameters: list[dict[str, Any]],
    request: dict[str, Any],
    replies: dict[str, Any],
) -> dict[str, Any]:
    """One POST of the request street."""
    return {
        "operationId": operation,
        "tags": [tag],
        "summary": summary,
        "parameters": [*parameters, *_REQUEST_HEADERS],
        "requestBody": {"required": True, "content": request},
        "responses": replies,
    }


def _lookup_one(operation: str, *path: dict[str, Any]) -> dict[str, Any]:
    examples = {
        "vectors": {"value": {"ids": [3, 7], "on_missing": "zero"}},
        "bags": {
            "summary": "Two bags: ids 3, 7, 7 and id 9",
            "value": {"ids": [3, 7, 7, 9], "offsets": [0, 3], "pooling": "mean"},
        },
    }
    rows = (
        "Row-major little-endian rows of `dtype`; int8 rows are codes, then a float32 scale and a float32 bias. Where "
        "ids were missing, found bits follow the rows, one for each id (bit i of byte i // 8, least significant first)."
    )
    return _call(
        operation,
        "Vectors of ids of one table",
        "lookup",
        [_TABLE, *path, *_OPTIONS, _TIMING],
        {_JSON: _ref("Lookup") | {"examples": examples}, OCTET_STREAM: _bytes("Little-endian int64 ids.")},
        {
            "200": {
                "description": "One row per id, in the order of the ids, or one per bag where there are `offsets`. "
                "JSON is answered in JSON, or with binary rows when it says `Accept: application/octet-stream`.",
                "headers": _headers(*_REPLY_HEADERS),
                "content": {_JSON: _ref("LookupReply"), OCTET_STREAM: _bytes(rows)},
            },
            **_errors(409),
        },
    )


def _lookup_many(operation: str, *path: dict[str, Any]) -> dict[str, Any]:
    return _call(
        operation,
        "Vectors of ids of many tables, all from one release",
        "lookup",
        list(path),
        {_JSON: _ref("ManyLookup")},
        {
            "200": {
                "description": "One entry per table.",
                "headers": _headers("X-Embedding-Release", "X-Request-ID"),
                "content": {_JSON: _ref("ManyLookupReply")},
            },
            **_errors(409),
        },
    )


def _infer(operation: str, *path: dict[str, Any]) -> dict[str, Any]:
    example = {"inputs": [{"name": "ids", "shape": [2], "datatype": "INT64", "data": [3, 7]}]}
    tensors = "A JSON object, then the bytes of the binary tensors in its order."
    return _call(
        operation,
        "Vectors by the Open Inference Protocol",
        _V2,
        [_MODEL, *path, _JSON_LENGTH],
        {_JSON: _ref("InferRequest") | {"example": example}, OCTET_STREAM: _bytes(tensors)},
        {
            "200": {
                "description": "The outputs asked for, as JSON or as binary tensors.",
                "headers": _headers("X-Request-ID"),
                "content": {_JSON: _ref("InferReply"), OCTET_STREAM: _bytes(tensors)},
            },
            **_errors(409, schema="InferProblem"),
        },
    )


def _probe(operation: str, summary: str, tag: str = "operations", *, can_fail: bool = True) -> dict[str, Any]:
    """A question that needs no key."""
    replies: dict[str, Any] = {"200": {"description": "Yes.", "content": {_JSON: _ref("Health")}}}
    if can_fail:
        replies["503"] = {"description": "No, and why.", "content": {_JSON: _ref("Health")}}
    call = {"operationId": operation, "tags": [tag], "summary": summary, "security": [], "responses": replies}
    return {"get": call}


PATHS: dict[str, Any] = {
    "/v1/tables/{table}/lookup": {"post": _lookup_one("lookup")},
    "/v1/tables/{table}/versions/{version}/lookup": {"post": _lookup_one("lookup_version", _VERSION)},
    "/v1/tables/{table}/labels/{label}/lookup": {"post": _lookup_one("lookup_label", _LABEL)},
    "/v1/lookup": {"post": _lookup_many("lookup_many")},
    "/v1/releases/{release}/lookup": {"post": _lookup_many("lookup_release", _RELEASE)},
    "/v2/models/{model}/infer": {"post": _infer("infer")},
    "/v2/models/{model}/versions/{version}/infer": {"post": _infer("infer_version", _VERSION)},
    "/livez": _probe("livez", "The process runs and answers", can_fail=False),
    "/startupz": _probe("startupz", "The store was looked at for the first time"),
    "/readyz": _probe("readyz", "Traffic is welcome: every table has just answered a lookup with the right vectors"),
    "/v2/health/live": _probe("server_live", "The same as /livez", _V2, can_fail=False),
    "/v2/health/ready": _probe("server_ready", "The same as /readyz", _V2),
}
_OF_VERSION = "/versions/{version}"
REPLIES = {
    "/v1/tables": "TableList",
    "/v1/tables/{table}": "TableInFull",
    "/v1/tables/{table}/versions": "VersionList",
    "/v1/tables/{table}/labels/{label}": "Label",
    "/v2": "ServerMetadata",
    "/v2/models/{model}": "ModelMetadata",
    "/v2/models/{model}/ready": "ModelReady",
    "/v2/models/{model}/config": "ModelConfig",
    "/v2/repository/index": "RepositoryIndex",
    "/v2/repository/models/{model}/load": "ModelChanged",
    "/v2/repository/models/{model}/unload": "ModelChanged",
}
"""What FastAPI's calls of ours answer, by path; the same for one version."""
BODIES = {
    "/v1/tables/{table}/labels/{label}": "LabelMove",
    "/v2/repository/index": "RepositoryFilter",
    "/v2/repository/models/{model}/load": "ModelChange",
    "/v2/repository/models/{model}/unload": "ModelChange",
}
"""What they take."""


def with_lookups(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with the calls of the request street in it, and every error in its one shape."""
    document["info"]["title"] = TITLE
    for path, calls in document["paths"].items():
        for call in calls.values():
            _settle(path, call)
    document["paths"] = PATHS | document["paths"]
    document["security"] = [{}, *({name: []} for name in _SECURITY)]
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FASTAPI_ONLY:
        schemas.pop(name, None)
    schemas.update(SCHEMAS)
    components.setdefault("securitySchemes", {}).update(_SECURITY)
    return document


def _settle(path: str, call: dict[str, Any]) -> None:
    """Describe what a call of FastAPI's really is: its name, what it takes, and what it answers."""
    call["operationId"] = call["summary"].lower().replace(" ", "_") + ("_version" if _OF_VERSION in path else "")
    call["summary"] = call.pop("description").rstrip(".")
    call["parameters"] = [parameter for name, parameter in _IN_PATHS.items() if f"{{{name}}}" in path]
    of_latest = path.replace(_OF_VERSION, "")
    if of_latest in BODIES:
        required = of_latest.startswith("/v1/")
        call["requestBody"] = {"required": required, "content": {_JSON: _ref(BODIES[of_latest])}}
    replies = call["responses"]
    if path == "/metrics":
        replies["200"]["content"] = {"text/plain": {"schema": TEXT}}
        call["security"] = []
        return
    replies["200"] = {"description": "Done."} | replies["200"] | {"content": {_JSON: _ref(REPLIES[of_latest])}}
    if any(name in str(replies.get("422")) for name in _FASTAPI_ONLY):
        replies.pop("422")
    schema = "InferProblem" if path.startswith("/v2") else "Problem"
    for status in (400, 401, 404, 503) if "{" in path else (401, 503):
        replies.setdefault(str(status), {})
    for status in replies:
        if status != "200":
            replies[status] = _problem(int(status), schema) | replies[status]
