"""The OpenAPI document is made of the types that decode requests, and of nothing that could drift from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import orjson
import pytest
from pydantic import BaseModel

from server.api import schemas
from server.api.codecs import json_body, tensors
from server.api.codecs.vectors import TEXT_DTYPES
from server.app import create_app
from server.settings import Settings


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a server that has no tables."""
    app = create_app(Settings(store=Path(tmp_path_factory.mktemp("store")), device="cpu"))
    return app.inner.openapi()  # type: ignore[attr-defined]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """Each `$ref` of the document names a schema that it has."""
    named = set(re.findall(r'"#/components/schemas/(\w+)"', orjson.dumps(document).decode()))
    assert named <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("name", "struct"), [("Lookup", json_body.LookupBody), ("ManyLookup", json_body.ManyBody)], ids=["one", "many"]
)
def test_a_lookup_body_has_the_fields_that_are_decoded(
    document: dict[str, Any], name: str, struct: type[msgspec.Struct]
) -> None:
    """A JSON lookup is documented with exactly the fields that its decoder takes, the required ones as required."""
    schema, fields = document["components"]["schemas"][name], msgspec.structs.fields(struct)
    assert list(schema["properties"]) == [field.name for field in fields]
    assert schema["required"] == [field.name for field in fields if field.required]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("model", "struct"),
    [
        (schemas.InferRequest, tensors._Head),
        (schemas.InferInput, tensors._Input),
        (schemas.WantedOutput, tensors._Output),
    ],
    ids=["request", "input", "output"],
)
def test_an_infer_body_has_the_fields_that_are_decoded(model: type[BaseModel], struct: type[msgspec.Struct]) -> None:
    """An infer request is documented with exactly the fields that its decoder takes."""
    fields = msgspec.structs.fields(struct)
    assert set(model.model_fields) == {field.name for field in fields}
    assert {name for name, field in model.model_fields.items() if field.is_required()} == {
        field.name for field in fields if field.required
    }


def test_documented_types_are_the_supported_ones() -> None:
    """The types of JSON vectors and of input tensors in the document are those that the codecs have."""
    assert get_args(schemas.LookupReply.model_fields["dtype"].annotation) == TEXT_DTYPES
    assert get_args(schemas.Datatype) == (*tensors.DTYPES, tensors.BYTES)
