"""What the lookup calls take and give, for the OpenAPI document; they are answered before FastAPI sees them."""

from __future__ import annotations

from typing import Any

from embstore.pooling import POOLINGS
from embstore.table import ON_MISSING
from server.codec import DTYPES
from server.problems import STATUS

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_ID = {"anyOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]}
_ON_MISSING = {"type": "string", "enum": list(ON_MISSING), "default": "zero"}
_DTYPE = {"type": "string", "enum": list(DTYPES), "default": "float32"}

SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "description": "RFC 9457 problem details.",
        "required": ["type", "title", "status", "detail", "instance", "code"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string", "description": "The request's id, as in X-Request-ID."},
            "code": {"type": "string", "enum": sorted(STATUS)},
            "table": {"type": "string"},
            "version": {"type": "integer"},
            "limit": {"type": "integer"},
        },
    },
    "Lookup": {
        "type": "object",
        "required": ["ids"],
        "additionalProperties": False,
        "properties": {
            "ids": {
                "type": "array",
                "items": _ID,
                "description": "Integers or decimal strings; for a table with string ids, its strings.",
            },
            "on_missing": _ON_MISSING,
            "dtype": _DTYPE,
            "found": {"type": "boolean", "default": False, "description": "Return `found` even when all were."},
            "offsets": {
                "type": "array",
                "items": {"type": "integer", "format": "int64", "minimum": 0},
                "description": "Where in `ids` each bag starts: the first at 0, none less than the one before, "
                "none past the end; the last bag ends with the ids. The reply has one vector a bag.",
            },
            "pooling": {
                "type": "string",
                "enum": list(POOLINGS),
                "description": "How the vectors of a bag become one. An empty bag is zeros; an id that is not there is "
                "left out under on_missing `zero`.",
            },
            "weights": {
                "type": "array",
                "items": {"type": "number", "format": "float"},
                "description": "One for each id, for `sum`, and for `mean` (none below 0), which is then sum(w e) / "
                "sum(w); `max` takes none.",
            },
        },
        "dependentRequired": {"offsets": ["pooling"], "pooling": ["offsets"], "weights": ["offsets", "pooling"]},
    },
    "Vectors": {
        "type": "object",
        "required": ["table", "version", "embedding_dim", "dtype", "vectors"],
        "properties": {
            "table": {"type": "string"},
            "version": {"type": "integer"},
            "embedding_dim": {"type": "integer"},
            "dtype": {"type": "string", "enum": list(DTYPES)},
            "vectors": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "number", "format": "float"}},
                "description": "One for each id in their order, or for each bag.",
            },
            "found": {
                "type": "array",
                "items": {"type": "boolean"},
                "description": "For each id whether the table has it; left out when it has all of them.",
            },
        },
    },
    "ManyLookup": {
        "type": "object",
        "required": ["tables"],
        "additionalProperties": False,
        "properties": {
            "tables": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"$ref": "#/components/schemas/Lookup"},
            }
        },
    },
    "ManyVectors": {
        "type": "object",
        "required": ["release", "tables"],
        "properties": {
            "release": {
                "type": ["string", "null"],
                "description": "The release that all tables are from; null when they were not published together.",
            },
            "tables": {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Vectors"}},
        },
    },
}

_HEADERS = {
    "X-Embedding-Version": "Version that answered.",
    "X-Embedding-Shape": "Rows and columns: n,d; n is ids, or bags.",
    "X-Embedding-Dtype": "Type of the numbers.",
    "X-Embedding-Missing": "How many ids the table does not have.",
    "X-Embedding-Release": "Release the version belongs to, where it does.",
    "X-Request-ID": "The request's id, echoed or made.",
}


def _parameter(name: str, where: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": schema,
        "description": description,
    }


_TABLE = _parameter("table", "path", {"type": "string"}, "Name of the table.")
_VERSION = _parameter("version", "path", {"type": "integer", "minimum": 1}, "A loaded version.")
_LABEL = _parameter("label", "path", {"type": "string"}, "A label of the table.")
_RELEASE = _parameter("release", "path", {"type": "string"}, "A loaded release.")
_OPTIONS = [
    _parameter("on_missing", "query", _ON_MISSING, "What ids get that are not there (octet-stream bodies)."),
    _parameter("dtype", "query", _DTYPE, "Type of the rows (octet-stream bodies)."),
]


def _errors(*statuses: int) -> dict[str, Any]:
    names = {400: "Malformed", 404: "Not found", 413: "Too large", 415: "Unsupported media type"}
    names |= {422: "Id out of range, or a value that is not allowed", 503: "Not ready"}
    return {
        str(status): {"description": names[status], "content": {"application/problem+json": {"schema": _PROBLEM}}}
        for status in statuses
    }


def _lookup_one(operation: str, *path: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": operation,
        "tags": ["lookup"],
        "summary": "Vectors of ids of one table",
        "parameters": [_TABLE, *path, *_OPTIONS],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Lookup"},
                    "examples": {
                        "vectors": {"value": {"ids": [3, 7], "on_missing": "zero"}},
                        "bags": {
                            "summary": "Two bags: ids 3, 7, 7 and id 9",
                            "value": {"ids": [3, 7, 7, 9], "offsets": [0, 3], "pooling": "mean"},
                        },
                    },
                },
                "application/octet-stream": {
                    "schema": {"type": "string", "format": "binary", "description": "Little-endian int64 ids."}
                },
            },
        },
        "responses": {
            "200": {
                "description": "One row per id, in the order of the ids, or one per bag where there are `offsets`. "
                "A JSON request is answered in JSON, or with "
                "the binary rows when it says `Accept: application/octet-stream`.",
                "headers": {
                    name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()
                },
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Vectors"}},
                    "application/octet-stream": {
                        "schema": {
                            "type": "string",
                            "format": "binary",
                            "description": "Row-major little-endian rows; where ids were missing, found bits follow, "
                            "one for each id (bit i of byte i // 8, least significant first).",
                        }
                    },
                },
            },
            **_errors(400, 404, 413, 415, 422, 503),
        },
    }


def _lookup_many(operation: str, *path: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": operation,
        "tags": ["lookup"],
        "summary": "Vectors of ids of many tables, all from one release",
        "parameters": list(path),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ManyLookup"}}},
        },
        "responses": {
            "200": {
                "description": "One entry per table.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ManyVectors"}}},
            },
            **_errors(400, 404, 413, 415, 422, 503),
        },
    }


PATHS: dict[str, Any] = {
    "/v1/tables/{table}/lookup": {"post": _lookup_one("lookup")},
    "/v1/tables/{table}/versions/{version}/lookup": {"post": _lookup_one("lookup_version", _VERSION)},
    "/v1/tables/{table}/labels/{label}/lookup": {"post": _lookup_one("lookup_label", _LABEL)},
    "/v1/lookup": {"post": _lookup_many("lookup_many")},
    "/v1/releases/{release}/lookup": {"post": _lookup_many("lookup_release", _RELEASE)},
}


def with_lookups(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with the lookup calls in it."""
    document["paths"] = PATHS | document["paths"]
    document.setdefault("components", {}).setdefault("schemas", {}).update(SCHEMAS)
    return document
