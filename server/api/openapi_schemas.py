"""Shapes of the bodies that the OpenAPI document names."""

from __future__ import annotations

from typing import Any

from embstore.pooling import POOLINGS
from embstore.table import ON_MISSING
from server.api.codecs.tensors import BYTES
from server.api.codecs.tensors import DTYPES as DATATYPES
from server.api.codecs.vectors import DTYPES
from server.http.problems import STATUS
from server.metrics.recorder import STATES

INT64 = {"type": "integer", "format": "int64"}
POSITIVE = {"type": "integer", "minimum": 1}
TEXT = {"type": "string"}
FLOATS = {"type": "array", "items": {"type": "number", "format": "float"}}
ID = {"anyOf": [INT64, TEXT]}


def _object(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    """An object whose fields are all there, but for the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties} | more


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _map(values: dict[str, Any], description: str, **more: Any) -> dict[str, Any]:
    """An object of any names."""
    return {"type": "object", "additionalProperties": values, "description": description} | more


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_PROBLEM = {
    "type": TEXT,
    "title": TEXT,
    "status": {"type": "integer"},
    "detail": TEXT,
    "instance": TEXT | {"description": "The request's id, as in X-Request-ID."},
    "code": _ref("ProblemCode"),
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
    "on_missing": _ref("OnMissing"),
    "dtype": _ref("Dtype"),
    "found": {"type": "boolean", "default": False, "description": "Return `found` even when all were."},
    "offsets": {
        "anyOf": [{"type": "array", "items": INT64 | {"minimum": 0}}, {"type": "null"}],
        "description": "Where in `ids` each bag starts: the first at 0, none less than the one before, none past the "
        "end; the last bag ends with the ids. The reply has one vector a bag.",
    },
    "pooling": {
        "anyOf": [{"type": "string", "title": "Pooling", "enum": list(POOLINGS)}, {"type": "null"}],
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
    "dtype": {"type": "string", "enum": list(DTYPES[:3])},
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
    "parameters": _ref("SchemeParameters"),
    "num_embeddings": POSITIVE,
    "embedding_dim": POSITIVE,
    "id_space": TEXT,
    "num_ids": {"type": "integer", "minimum": 0},
    "num_bytes": {"type": "integer", "minimum": 0, "description": "What the arrays hold."},
    "id_space_bytes": {"type": "integer", "minimum": 0},
    "full_bytes": {"type": "integer", "minimum": 0, "description": "What a float32 row for every id would hold."},
    "device": TEXT,
    "created": TEXT,
    "metrics": _ref("TrainingMetrics"),
}
_VERSION = {
    "version": POSITIVE,
    "state": {"type": "string", "enum": list(STATES)},
    "reason": _or_null(TEXT) | {"description": "Why it is not served; null where it is."},
    "num_bytes": _or_null({"type": "integer", "minimum": 0}) | {"description": "What the arrays hold, once loaded."},
}
_HEALTH = {
    "status": {"type": "string", "enum": ["ok", "not ready"]},
    "reasons": {"type": "array", "items": TEXT},
    "tables": _map(POSITIVE, "Version served of each table."),
    "unserved": {"type": "array", "items": TEXT, "description": "Tables none of whose versions can be served."},
}
_INPUT = {
    "name": TEXT
    | {"description": "`ids`, `offsets`, `weights`; for the model `embstore` a table, or `{table}.offsets`."},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "datatype": {"type": "string", "enum": [*DATATYPES, BYTES]},
    "parameters": _ref("InferParameters"),
    "data": {"type": "array", "items": {}, "description": "Numbers or strings, flat in row-major order or nested."},
}
_OUTPUT = {
    "name": TEXT | {"description": "`embeddings`, `found`; for the model `embstore` a table, or `{table}.found`."},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "datatype": {"type": "string", "enum": ["FP32", "FP16", "BOOL"]},
    "parameters": _ref("InferParameters"),
    "data": {"type": "array", "items": {}, "description": "Flat, in row-major order."},
}
_TENSOR = {
    "name": TEXT,
    "datatype": TEXT,
    "shape": {"type": "array", "items": {"type": "integer"}, "description": "-1 where any length will do."},
}

SCHEMAS: dict[str, Any] = {
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
    "ProblemCode": {"type": "string", "enum": sorted(STATUS), "description": "What went wrong, for programs."},
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
    "LookupReply": _object(_VECTORS, "found"),
    "ManyLookup": _object(
        {"tables": _map(_ref("Lookup"), "A lookup for each table, by its name.", minProperties=1)},
        additionalProperties=False,
    ),
    "ManyLookupReply": _object(
        {
            "release": _or_null(TEXT)
            | {"description": "The release that all tables are from; null when they were not published together."},
            "tables": _map(_ref("LookupReply"), "The vectors of each table, by its name."),
        }
    ),
    "Table": _object(_TABLE),
    "TableList": _object({"tables": {"type": "array", "items": _ref("Table")}}),
    "TableInFull": _object(
        _TABLE
        | {
            "labels": _map(POSITIVE, "Version of each label."),
            "cache": {"type": "object", "description": "What the cache before the table does, and what it measured."},
            "versions": {"type": "array", "items": _ref("Version")},
        }
    ),
    "SchemeParameters": {"type": "object", "description": "Parameters of the scheme."},
    "TrainingMetrics": {"type": "object", "description": "What was measured when the table was trained."},
    "Version": _object(_VERSION),
    "VersionList": _object({"table": TEXT, "versions": {"type": "array", "items": _ref("Version")}}),
    "LabelMove": _object({"version": POSITIVE}, additionalProperties=False),
    "Label": _object(
        {
            "table": TEXT,
            "label": TEXT,
            "version": POSITIVE,
            "served": _or_null(POSITIVE) | {"description": "Version that the label answers with here and now."},
        }
    ),
    "Health": _object(_HEALTH, "reasons", "tables", "unserved"),
    "InferParameters": {
        "type": "object",
        "description": "`on_missing`, `pooling`, `dtype`, `timeout` in microseconds, `binary_data_output`; of a tensor "
        "`binary_data` and `binary_data_size`; in replies `release`, `version` and `missing`.",
    },
    "InferInput": _object(_INPUT, "parameters", "data"),
    "InferOutput": _object(_OUTPUT, "parameters", "data"),
    "WantedOutput": _object({"name": TEXT, "parameters": _ref("InferParameters")}, "parameters"),
    "InferRequest": _object(
        {
            "id": TEXT | {"description": "Comes back in the reply."},
            "parameters": _ref("InferParameters"),
            "inputs": {"type": "array", "items": _ref("InferInput"), "minItems": 1},
            "outputs": {
                "type": "array",
                "items": _ref("WantedOutput"),
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
            "parameters": _ref("InferParameters"),
            "outputs": {"type": "array", "items": _ref("InferOutput")},
        },
        *("model_version", "id", "parameters"),
    ),
    "ServerMetadata": _object({"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}}),
    "ModelMetadata": _object(
        {
            "name": TEXT,
            "versions": {"type": "array", "items": TEXT},
            "platform": TEXT,
            "inputs": {"type": "array", "items": _ref("TensorMetadata")},
            "outputs": {"type": "array", "items": _ref("TensorMetadata")},
        }
    ),
    "TensorMetadata": _object(_TENSOR),
    "ModelReady": _object({"name": TEXT, "ready": {"type": "boolean"}}),
    "ModelConfig": _object(
        {
            "name": TEXT,
            "platform": TEXT,
            "max_batch_size": {"type": "integer"},
            "input": {"type": "array", "items": _ref("TensorConfig")},
            "output": {"type": "array", "items": _ref("TensorConfig")},
        }
    ),
    "TensorConfig": _object(
        {"name": TEXT, "data_type": TEXT, "dims": _TENSOR["shape"], "optional": {"type": "boolean"}}, "optional"
    ),
    "RepositoryFilter": _object({"ready": {"type": "boolean", "description": "Only models that serve."}}, "ready"),
    "RepositoryEntry": _object(
        {
            "name": TEXT,
            "version": TEXT,
            "state": {"type": "string", "enum": ["LOADING", "READY", "UNAVAILABLE"]},
            "reason": TEXT,
        }
    ),
    "RepositoryIndex": {"type": "array", "items": _ref("RepositoryEntry")},
    "ModelChange": _object(
        {"parameters": _or_null({"type": "object", "title": "Parameters", "description": "None are supported."})},
        "parameters",
    ),
    "ModelChanged": {"type": "object", "description": "Nothing more to say."},
}
