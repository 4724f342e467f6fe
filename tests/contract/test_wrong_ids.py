"""Ids of the wrong type: one status and one class by whatever way they come, and the table and the id are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from embstore_client import EmbeddingClient, WrongDtype
from support.serving import ServerProcess, serving

import embstore
from embstore.schemes import Full

OCTETS = {"Content-Type": "application/octet-stream"}
HINT = "; send JSON strings, or BYTES by the Open Inference Protocol"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Users under integers and items under strings, in one release."""
    folder = tmp_path_factory.mktemp("wrong-ids")
    names = [f"sku-{row}" for row in range(10)]
    publications = {"user": embstore.Publication(Full(10, 4)), "item": embstore.Publication(Full(10, 4), ids=names)}
    embstore.open_store(folder / "store").publish_release(publications)
    with serving(folder / "store", folder / "log") as running:
        yield running


def tensor(name: str, datatype: str, data: list[Any]) -> dict[str, Any]:
    """An input of an infer request."""
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": data}


def infer(model: str, *inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An infer request."""
    return f"/v2/models/{model}/infer", {"json": {"inputs": inputs}}


def lookup(table: str, ids: list[Any]) -> tuple[str, dict[str, Any]]:
    """A JSON lookup of one table."""
    return f"/v1/tables/{table}/lookup", {"json": {"ids": ids}}


RAW = {"content": np.array([1, 2], "<i8").tobytes(), "headers": OCTETS | {"Inference-Header-Content-Length": "0"}}
BOTH = {"tables": {"user": {"ids": [1, "abc"]}, "item": {"ids": ["sku-1"]}}}
CASES: dict[str, tuple[tuple[str, dict[str, Any]], str, str]] = {
    "strings": (lookup("user", [1, "abc"]), "user", "table 'user' has int64 ids; ids[1] is 'abc'"),
    "many digits": (lookup("user", ["9" * 20]), "user", f"table 'user' has int64 ids; ids[0] is '{'9' * 20}'"),
    "past int64": (lookup("user", [1 << 63]), "user", f"table 'user' has int64 ids; ids[0] is {1 << 63}"),
    "integers": (lookup("item", ["sku-1", 2]), "item", f"table 'item' has string ids; ids[1] is 2{HINT}"),
    "octets": (
        ("/v1/tables/item/lookup", {"content": np.array([7], "<i8").tobytes(), "headers": OCTETS}),
        "item",
        f"table 'item' has string ids; ids[0] is 7{HINT}",
    ),
    "text as octets": (
        ("/v1/tables/item/lookup", {"content": b"sku-1", "headers": OCTETS}),
        "item",
        f"table 'item' has string ids{HINT}",
    ),
    "one of many": (("/v1/lookup", {"json": BOTH}), "user", "table 'user' has int64 ids; ids[1] is 'abc'"),
    "infer strings": (
        infer("user", tensor("ids", "BYTES", ["5", "abc"])),
        "user",
        "table 'user' has int64 ids; input 'ids'[1] is 'abc'",
    ),
    "infer floats": (
        infer("user", tensor("ids", "FP32", [1.5])),
        "user",
        "table 'user' has int64 ids; input 'ids' is FP32: send INT64, or another integer type",
    ),
    "infer past int64": (
        infer("user", tensor("ids", "UINT64", [1, 1 << 63])),
        "user",
        f"table 'user' has int64 ids; input 'ids': element 1 is {1 << 63}, which does not fit a signed 64-bit integer",
    ),
    "infer integers": (
        infer("item", tensor("ids", "INT64", [5, 6])),
        "item",
        f"table 'item' has string ids; input 'ids'[0] is 5{HINT}",
    ),
    "infer many": (
        infer("embstore", tensor("user", "INT64", [1]), tensor("item", "INT32", [5])),
        "item",
        f"table 'item' has string ids; input 'item'[0] is 5{HINT}",
    ),
    "infer without JSON": (
        ("/v2/models/item/infer", RAW),
        "item",
        f"table 'item' has string ids; input 'ids'[0] is 1{HINT}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_of_the_wrong_type_are_one_problem(server: ServerProcess, case: str) -> None:
    """422 `wrong_dtype` in JSON, in octets and by the Open Inference Protocol, with the table beside the text."""
    (path, body), table, text = CASES[case]
    reply = httpx.post(server.url + path, **body)
    problem = reply.json()
    assert (reply.status_code, problem["code"], problem["table"]) == (422, "wrong_dtype", table)
    assert problem["detail"] == text


@pytest.mark.parametrize(
    ("table", "ids", "text"),
    [
        ("user", ["abc"], "table 'user' has int64 ids; ids[0] is 'abc'"),
        ("item", [1, 2], "table 'item' has string ids; ids[0] is 1"),
        ("item", np.array([1, 2]), "table 'item' has string ids; ids[0] is 1"),
    ],
)
def test_the_client_says_that_ids_were_swapped(server: ServerProcess, table: str, ids: Any, text: str) -> None:
    """Every kind of call raises the same class, which names the table and says what to pass."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        with pytest.raises(WrongDtype) as caught:
            client.lookup(table, ids)
        assert (caught.value.status, caught.value.table) == (422, table)
        assert caught.value.detail.startswith(text)
        for call in (
            lambda: client.lookup(table, ids, offsets=[0], pooling="sum"),
            lambda: client.lookup_many({table: ids}),
        ):
            with pytest.raises(WrongDtype) as caught:
                call()
            assert caught.value.table == table


def test_no_ids_fit_every_table(server: ServerProcess) -> None:
    """An empty list says nothing of its type."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        assert [len(client.lookup(table, []).vectors) for table in ("user", "item")] == [0, 0]
