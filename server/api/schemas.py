"""Types that only the OpenAPI document needs: names in paths, replies written without FastAPI, and problems."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROBLEM = "application/problem+json"
REF = "#/components/schemas/{model}"

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Datatype = Literal[
    "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8", "FP32", "FP64", "FP16", "BYTES"
]
ERRORS = {
    400: "Malformed request",
    401: "API key required",
    403: "Not allowed",
    404: "Unknown table, version, label or release",
    409: "Conflict with what is served",
    413: "Too many ids or bytes",
    415: "Unsupported media type or coding",
    422: "Id out of range, or value not allowed",
    429: "Overloaded",
    503: "Not ready, or shutting down",
    504: "X-Request-Timeout-Ms exceeded",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


class LookupReply(BaseModel):
    """Vectors of one table."""

    table: str
    version: Positive
    embedding_dim: Positive
    dtype: Literal["float32", "float16", "bfloat16"]
    vectors: list[list[float]] = Field(description="One for each id in their order, or for each bag.")
    found: list[bool] = Field(
        default_factory=list, description="For each id whether the table has it; left out when it has all of them."
    )


class ManyLookupReply(BaseModel):
    """Vectors of many tables."""

    release: str | None = Field(
        description="The release that all tables are from; null when they were not published together."
    )
    tables: dict[str, LookupReply] = Field(description="The vectors of each table, by its name.")


class InferParameters(BaseModel):
    """`on_missing`, `pooling`, `dtype`, `timeout` in microseconds, `binary_data_output`; of a tensor `binary_data` and
    `binary_data_size`, or `shared_memory_region`, `shared_memory_byte_size` and `shared_memory_offset`; in replies
    `release`, `version` and `missing`."""

    model_config = ConfigDict(extra="allow")


class InferInput(BaseModel):
    """One input tensor."""

    name: str = Field(
        description="`ids`, `offsets`, `weights`; for the model `embstore` a table, or `{table}.offsets`."
    )
    shape: list[Count]
    datatype: Datatype
    parameters: InferParameters = Field(default_factory=InferParameters)
    data: list[Any] = Field(default_factory=list, description="Numbers or strings, flat in row-major order or nested.")


class WantedOutput(BaseModel):
    """One output that the caller names."""

    name: str
    parameters: InferParameters = Field(default_factory=InferParameters)


class InferRequest(BaseModel):
    """Input tensors, and the outputs wanted."""

    id: str = Field(default_factory=str, description="Comes back in the reply.")
    parameters: InferParameters = Field(default_factory=InferParameters)
    inputs: list[InferInput] = Field(min_length=1)
    outputs: list[WantedOutput] = Field(default_factory=list, description="Outputs wanted; all of them when left out.")


class InferOutput(BaseModel):
    """One output tensor."""

    name: str = Field(description="`embeddings`, `found`; for the model `embstore` a table, or `{table}.found`.")
    shape: list[Count]
    datatype: Literal["FP32", "FP16", "BOOL"]
    parameters: InferParameters = Field(default_factory=InferParameters)
    data: list[Any] = Field(default_factory=list, description="Flat, in row-major order.")


class InferReply(BaseModel):
    """Output tensors."""

    model_name: str
    model_version: str = Field(default_factory=str)
    id: str = Field(default_factory=str)
    parameters: InferParameters = Field(default_factory=InferParameters)
    outputs: list[InferOutput]


class Health(BaseModel):
    """What a probe is told."""

    status: Literal["ok", "not ready"]
    reasons: list[str] = Field(default_factory=list)
    tables: dict[str, Positive] = Field(default_factory=dict, description="Version served of each table.")
    unserved: list[str] = Field(default_factory=list, description="Tables none of whose versions can be served.")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's id, as in X-Request-ID.")
    code: str
    table: str = Field(default_factory=str)
    version: int = Field(default_factory=int)
    limit: int = Field(default_factory=int)
    retry_after: int = Field(default_factory=int, description="Seconds, as in Retry-After.")


class InferProblem(Problem):
    """RFC 9457 problem details, with the `error` that clients of the Open Inference Protocol read."""

    error: str = Field(description="The same as `detail`.")


MODELS = (LookupReply, ManyLookupReply, InferRequest, InferReply, Health, Problem, InferProblem)
"""Models that the document names and no route of FastAPI does."""


def ref(model: str) -> dict[str, Any]:
    """A schema that is defined elsewhere in the document."""
    return {"$ref": REF.format(model=model)}


def content(model: str, octets: str | None = None) -> dict[str, Any]:
    """A body of JSON, or of bytes that `octets` describes."""
    binary = {"schema": {"type": "string", "format": "binary", "description": octets}}
    return {"application/json": {"schema": ref(model)}} | ({"application/octet-stream": binary} if octets else {})


def body(model: str, *, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that decodes its body itself."""
    return {"requestBody": {"required": required, "content": content(model)}}


def problems(*statuses: int, model: str = "Problem") -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these errors, and those that every call may end in."""
    replies: dict[int | str, dict[str, Any]] = {}
    for status in sorted({401, 503, *statuses}):
        replies[status] = {"description": ERRORS[status], "content": {PROBLEM: {"schema": ref(model)}}}
        if status in (429, 503):
            replies[status]["headers"] = _RETRY_AFTER
    return replies
