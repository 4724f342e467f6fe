"""Shapes of the bodies that the OpenAPI document names."""

from __future__ import annotations

from typing import Any

from embstore.pooling import POOLINGS
from embstore.table import ON_MISSING
from server.codec import DTYPES, JSON_DTYPES
from server.inference_codec import BYTES
from server.inference_codec import DTYPES as DATATYPES
from server.metrics import STATES
from server.problems import STATUS

INT64 = {"type": "integer", "format": "int64"}
POSITIVE = {"type": "integer", "minimum": 1}
TEXT = {"type": "string"}
FLOATS = {"type": "array", "items": {"type": "number", "format": "float"}}
ID = {"anyOf": [INT64, TEXT]}
ON_MISSING_NAME = {"type": "string", "enum": list(ON_MISSING), "default": "zero"}
DTYPE_NAME = {"type": "string", "enum": list(DTYPES), "default": "float32"}


def _object(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    """An object whose fields are all there, but for the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties} | more


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_PROBLEM = {
    "type": TEXT,
    "title": TEXT,
    "status": {"type": "integer"},
    "detail": TEXT,
    "instance": TEXT | {"description": "The request's id, as in X-Request-ID."},
    "code": {"type": "string", "enum": sorted(STATUS)},
    "table": TEXT,
    "version": {"type": "integer"},
    "limit": {"type": "integer"},
    "retry_after": {"type": "integer", "description": "Seconds, as in Retry-After."},
}
_LOOKUP = {
    "ids": {
        "type": "array",
        "items": ID,
        "description": "Integers or decimal strings; for a table with string ids, its strings.",
    },
    "on_missing": ON_MISSING_NAME,
    "dtype": DTYPE_NAME
    | {
        "description": f"JSON replies have {', '.join(JSON_DTYPES)}; int8 goes with `Accept: application/octet-stream`."
    },
    "found": {"type": "boolean", "default": False, "description": "Return `found` even when all were."},
    "offsets": {
        "anyOf": [{"type": "array", "items": INT64 | {"minimum": 0}}, {"type": "null"}],
        "description": "Where in `ids` each bag starts: the first at 0, none less than the one before, none past the "
        "end; the last bag ends with the ids. The reply has one vector a bag.",
    },
    "pooling": {
        "anyOf": [{"type": "string", "enum": list(POOLINGS)}, {"type": "null"}],
        "description": "How the vectors of a bag become one. An empty bag is zeros; an id that is not there is left "
        "out under on_missing `zero`.",
    },
    "weights": {
        "anyOf": [FLOATS, {"type": "null"}],
        "description": "One for each id, for `sum`, and for `mean` (none below 0), which is then sum(w e) / sum(w); "
        "`max` takes none.",
    },
}
_VECTORS = {
    "table": TEXT,
    "version": POSITIVE,
    "embedding_dim": POSITIVE,
    "dtype": {"type": "string", "enum": list(JSON_DTYPES)},
    "vectors": {"type": "array", "items": FLOATS, "description": "One for each id in their order, or for each bag."},
    "found": {
        "type": "array",
        "items": {"type": "boolean"},
        "description": "For each id whether the table has it; left out when it has all of them.",
    },
}
_TABLE = {
    "table": TEXT,
    "version": POSITIVE,
    "release": _or_null(TEXT),
    "scheme": TEXT,
    "parameters": {"type": "object"},
    "num_embeddings": POSITIVE,
    "embedding_dim": POSITIVE,
    "id_space": TEXT,
    "num_ids": {"type": "integer", "minimum": 0},
    "num_bytes": {"type": "integer", "minimum": 0, "description": "What the arrays hold."},
    "id_space_bytes": {"type": "integer", "minimum": 0},
    "full_bytes": {"type": "integer", "minimum": 0, "description": "What a float32 row for every id would hold."},
    "device": TEXT,
    "created": TEXT,
    "metrics": {"type": "object"},
}
_VERSION = {
    "version": POSITIVE,
    "state": {"type": "string", "enum": list(STATES)},
    "reason": _or_null(TEXT),
    "num_bytes": _or_null({"type": "integer", "minimum": 0}),
}
_HEALTH = {
    "status": {"type": "string", "enum": ["ok", "not ready"]},
    "reasons": {"type": "array", "items": TEXT},
    "tables": {"type": "object", "additionalProperties": POSITIVE, "description": "Version served of each table."},
    "unserved": {"type": "array", "items": TEXT, "description": "Tables none of whose versions can be served."},
}
_INPUT = {
    "name": TEXT
    | {"description": "`ids`, `offsets`, `weights`; for the model `embstore` a table, or `{table}.offsets`."},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "datatype": {"type": "string", "enum": [*DATATYPES, BYTES]},
    "parameters": {"type": "object"},
    "data": {"type": "array", "items": {}, "description": "Numbers or strings, flat in row-major order or nested."},
}
_OUTPUT = {
    "name": TEXT | {"description": "`embeddings`, `found`; for the model `embstore` a table, or `{table}.found`."},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "datatype": {"type": "string", "enum": ["FP32", "FP16", "BOOL"]},
    "parameters": {"type": "object"},
    "data": {"type": "array", "items": {}},
}

SCHEMAS: dict[str, Any] = {
    "Problem": _object(_PROBLEM, "table", "version", "limit", "retry_after", description="RFC 9457 problem details."),
    "InferProblem": _object(
        _PROBLEM | {"error": TEXT | {"description": "The same as `detail`."}},
        *("table", "version", "limit", "retry_after"),
        description="RFC 9457 problem details, with the `error` that clients of the Open Inference Protocol read.",
    ),
    "Lookup": _object(
        _LOOKUP,
        *(name for name in _LOOKUP if name != "ids"),
        additionalProperties=False,
        dependentRequired={"offsets": ["pooling"], "pooling": ["offsets"], "weights": ["offsets", "pooling"]},
    ),
    "Vectors": _object(_VECTORS, "found"),
    "ManyLookup": _object(
        {"tables": {"type": "object", "minProperties": 1, "additionalProperties": _ref("Lookup")}},
        additionalProperties=False,
    ),
    "ManyVectors": _object(
        {
            "release": _or_null(TEXT)
            | {"description": "The release that all tables are from; null when they were not published together."},
            "tables": {"type": "object", "additionalProperties": _ref("Vectors")},
        }
    ),
    "Table": _object(_TABLE),
    "Tables": _object({"tables": {"type": "array", "items": _ref("Table")}}),
    "TableInFull": _object(
        _TABLE
        | {
            "labels": {"type": "object", "additionalProperties": POSITIVE},
            "versions": {"type": "array", "items": _ref("Version")},
        }
    ),
    "Version": _object(_VERSION),
    "Versions": _object({"table": TEXT, "versions": {"type": "array", "items": _ref("Version")}}),
    "Health": _object(_HEALTH, "reasons", "tables", "unserved"),
    "InferRequest": _object(
        {
            "id": TEXT | {"description": "Comes back in the reply."},
            "parameters": {
                "type": "object",
                "description": "`on_missing`, `pooling`, `dtype`, `timeout` in microseconds, `binary_data_output`.",
            },
            "inputs": {"type": "array", "items": _object(_INPUT, "parameters", "data"), "minItems": 1},
            "outputs": {
                "type": "array",
                "items": _object({"name": TEXT, "parameters": {"type": "object"}}, "parameters"),
                "description": "Outputs wanted; all of them when left out.",
            },
        },
        *("id", "parameters", "outputs"),
    ),
    "InferReply": _object(
        {
            "model_name": TEXT,
            "model_version": TEXT,
            "id": TEXT,
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": _object(_OUTPUT, "parameters", "data")},
        },
        *("model_version", "id", "parameters"),
    ),
}
