"""Bags over HTTP: the library's vectors, its words for mistakes, and the server's limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from support.bag_cases import BAD
from support.serving import ServerProcess, serving

import embstore
from embstore.schemes import MEmCom
from embstore.table import Table

Floats = NDArray[np.float32]
WAYS = [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)]
NUM, DIM = 400, 16
NAMES = [f"sku-{row}" for row in range(NUM)]
LIMITS = {"EMBSTORE_MAX_IDS": "1000", "EMBSTORE_MAX_REPLY_BYTES": str(4 * DIM * 600), "EMBSTORE_INLINE_IDS": "300"}
LIMIT = "the limit is 600 for vectors of this size (max_reply_bytes)"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, dict[str, Table]]]:
    """A server with low limits and a cache, and the tables it serves."""
    folder = tmp_path_factory.mktemp("pooling")
    store = embstore.open_store(folder / "store")
    vectors = np.random.default_rng(0).standard_normal((NUM, DIM), np.float32)
    vectors[4:6] = 1
    store.publish_release(
        {
            "item": embstore.Publication(vectors),
            "user": embstore.Publication(MEmCom(NUM, DIM, num_buckets=30, bias=True), ids=NAMES),
        }
    )
    with serving(folder / "store", folder / "log", env=LIMITS, redis="embedded", cache="on") as running:
        yield running, {name: store.load(name) for name in ("item", "user")}


def post(server: ServerProcess, path: str, body: Any, **headers: str) -> httpx.Response:
    """A JSON call; a body of bytes goes as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"} | headers)


@pytest.mark.parametrize(("pooling", "weighted"), WAYS)
@pytest.mark.parametrize("path", ["item", "item/versions/1", "item/labels/latest"])
@pytest.mark.parametrize("size", [20, 500])
def test_http_answers_are_the_librarys(tables: Any, path: str, pooling: Any, weighted: bool, size: int) -> None:
    """One vector a bag, bit for bit, on the event loop and in a thread, and no `found` when every id was."""
    server, library = tables
    ids = np.random.default_rng(size).integers(0, NUM, size)
    body = {"ids": ids.tolist(), "offsets": [0, 0, 3, 17, size], "pooling": pooling}
    if weighted:
        body["weights"] = np.random.default_rng(0).random(size).tolist()
    reply = post(server, f"/v1/tables/{path}/lookup", body)
    options = {name: body[name] for name in ("offsets", "pooling", "weights") if name in body}
    assert (reply.status_code, reply.headers["X-Embedding-Shape"]) == (200, f"5,{DIM}")
    answer = reply.json()
    np.testing.assert_array_equal(np.array(answer.pop("vectors"), np.float32), library["item"].lookup(ids, **options))
    assert answer == {"table": "item", "version": 1, "embedding_dim": DIM, "dtype": "float32"}


@pytest.mark.parametrize("on_missing", ["zero", "default", "hash"])
def test_http_found_is_of_ids(tables: Any, on_missing: str) -> None:
    """String keys; `found` has one entry an id, and so have the bits behind binary rows."""
    server, library = tables
    ids = ["sku-1", "nobody", "sku-3", "sku-1", "sku-399", "", "sku-2", "sku-0", "sku-9"]
    body = {"ids": ids, "offsets": [0, 2], "pooling": "mean", "on_missing": on_missing}
    expected, found = library["user"].lookup(
        ids, offsets=[0, 2], pooling="mean", on_missing=on_missing, return_found=True
    )
    answer = post(server, "/v1/tables/user/lookup", body)
    np.testing.assert_array_equal(np.array(answer.json()["vectors"], np.float32), expected)
    assert answer.json()["found"] == found.tolist()
    octets = post(server, "/v1/tables/user/lookup", body, Accept="application/octet-stream")
    assert octets.content == expected.tobytes() + np.packbits(found, bitorder="little").tobytes()
    assert (octets.headers["X-Embedding-Shape"], octets.headers["X-Embedding-Missing"]) == (f"2,{DIM}", "2")
    assert post(server, "/v1/tables/user/lookup", body | {"on_missing": "error"}).json()["code"] == "id_out_of_range"
    everyone = post(server, "/v1/tables/user/lookup", body | {"ids": ids[2:5], "found": True})
    assert everyone.json()["found"] == [True] * 3


def test_http_half_precision_is_of_the_pooled(tables: Any) -> None:
    """dtype=float16 rounds the answer, not what goes into it; a sum that does not fit is refused."""
    server, library = tables
    body = {"ids": [1, 2, 3], "offsets": [0], "pooling": "sum", "dtype": "float16"}
    answer = post(server, "/v1/tables/item/lookup", body).json()["vectors"]
    expected = library["item"].lookup([1, 2, 3], offsets=[0], pooling="sum").astype(np.float16)
    np.testing.assert_array_equal(np.array(answer, np.float16), expected)
    reply = post(server, "/v1/tables/item/lookup", body | {"weights": [1e30] * 3})
    assert reply.status_code == 422
    assert "float16 holds numbers up to 65504; ask for bfloat16, int8 or float32" in reply.json()["detail"]


def test_http_many_tables_pool_each_their_own_way(tables: Any) -> None:
    """One table in bags, the other id by id, from one release."""
    server, library = tables
    item = {"ids": [3, 7, 7, 9], "offsets": [0, 3], "pooling": "mean"}
    reply = post(server, "/v1/lookup", {"tables": {"user": {"ids": NAMES[:4], "found": True}, "item": item}})
    answer = reply.json()
    assert (reply.status_code, answer["release"]) == (200, "1")
    vectors = {name: np.array(one["vectors"], np.float32) for name, one in answer["tables"].items()}
    np.testing.assert_array_equal(vectors["user"], library["user"].lookup(NAMES[:4]))
    np.testing.assert_array_equal(vectors["item"], library["item"].lookup(**item))
    assert answer["tables"]["user"]["found"] == [True] * 4
    pinned = post(server, "/v1/releases/1/lookup", {"tables": {"item": item}})
    assert pinned.json()["tables"]["item"]["vectors"] == answer["tables"]["item"]["vectors"]
    refused = post(server, "/v1/lookup", {"tables": {"user": {"ids": []}, "item": item | {"offsets": [2]}}}).json()
    assert (refused["code"], refused["table"]) == ("unprocessable", "item")
    assert refused["detail"] == "offsets[0] is 2: it must be 0, where the first bag starts"


@pytest.mark.parametrize("case", BAD)
def test_http_bad_bags_are_problems(tables: Any, case: str) -> None:
    """422 with the library's words and the table's name; the next request is unharmed."""
    server, _ = tables
    options, _, text = BAD[case]
    reply = post(server, "/v1/tables/item/lookup", {"ids": [5, 4, 5], **options})
    problem = reply.json()
    assert (reply.status_code, problem["code"], problem["table"]) == (422, "unprocessable", "item")
    assert problem["detail"] == text
    assert reply.headers["Content-Type"] == "application/problem+json"
    good = {"ids": [5, 4, 5], "offsets": [0], "pooling": "sum"}
    assert post(server, "/v1/tables/item/lookup", good).status_code == 200


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (b'"offsets": [0.5], "pooling": "sum"', "body: Expected `int`, got `float` - at `$.offsets[0]`"),
        (b'"offsets": ["0"], "pooling": "sum"', "body: Expected `int`, got `str` - at `$.offsets[0]`"),
        (b'"offsets": 0, "pooling": "sum"', "body: Expected `array | null`, got `int` - at `$.offsets`"),
        (b'"offsets": [0], "pooling": 1', "body: Expected `str | null`, got `int` - at `$.pooling`"),
        (b'"offsets": [0], "pooling": "sum", "weights": [NaN]', "body: JSON is malformed"),
        (b'"offsets": [0], "pooling": "sum", "weights": [null]', "body: Expected `float`, got `null`"),
        (b'"offsets": [0], "pooling": "sum", "weights": ["1"]', "body: Expected `float`, got `str`"),
        (b'"offsets": [0], "pooling": "sum", "weights": [1e400]', "body: Number out of range"),
        (b'"offset": [0], "pooling": "sum"', "body: Object contains unknown field `offset`"),
    ],
)
def test_http_what_is_no_list_of_numbers_is_malformed(tables: Any, fields: bytes, detail: str) -> None:
    """400 with the place in the body."""
    reply = post(tables[0], "/v1/tables/item/lookup", b'{"ids": [5], ' + fields + b"}")
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_request")
    assert reply.json()["detail"].startswith(detail)


def test_http_limits_are_of_ids_and_of_bags(tables: Any) -> None:
    """Ids are limited as ever; the reply's bytes limit the bags, not the ids in them."""
    server, _ = tables
    path = "/v1/tables/item/lookup"

    def refused(reply: httpx.Response) -> tuple[int, str, int]:
        return reply.status_code, reply.json()["detail"], reply.json()["limit"]

    assert refused(post(server, path, {"ids": [1] * 601})) == (413, f"601 ids in one request; {LIMIT}", 600)
    pooled = {"ids": [1] * 1000, "offsets": [0, 500], "pooling": "sum"}
    assert len(post(server, path, pooled).json()["vectors"]) == 2
    text = "1,001 ids in one request; the limit is 1,000 (max_ids)"
    assert refused(post(server, path, pooled | {"ids": [1] * 1001})) == (413, text, 1000)
    empty = {"ids": [], "offsets": [0] * 600, "pooling": "max"}
    assert post(server, path, empty).json()["vectors"] == [[0.0] * DIM] * 600
    text = f"601 bags in one request; {LIMIT}"
    assert refused(post(server, path, empty | {"offsets": [0] * 601})) == (413, text, 600)
    many = {"tables": {"item": pooled, "user": {"ids": []}}}
    assert post(server, "/v1/lookup", many).status_code == 200
    many["tables"]["user"] = empty | {"offsets": [0] * 999}
    text = "1,001 vectors in one request; the limit is 1,000 (max_ids)"
    assert refused(post(server, "/v1/lookup", many)) == (413, text, 1000)


def test_http_pooled_ids_are_counted_and_not_cached(tables: Any) -> None:
    """Metrics count ids, not bags; the cache of rows is not asked."""
    server, _ = tables

    def series(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])

    names = [
        'embstore_ids_total{status="found",table="item"}',
        'embstore_ids_total{status="missing",table="item"}',
        'embstore_cache_ids_total{result="hit",table="item",tier="redis"}',
        'embstore_cache_ids_total{result="miss",table="item",tier="redis"}',
    ]
    before = [series(name) for name in names]
    body = {"ids": [1, 2, 3, NUM, -1], "offsets": [0], "pooling": "sum"}
    assert post(server, "/v1/tables/item/lookup", body).status_code == 200
    assert [series(name) - was for name, was in zip(names, before, strict=True)] == [3, 2, 0, 0]


def test_http_pooling_is_in_the_document(tables: Any) -> None:
    """OpenAPI says what a body may hold."""
    lookup = httpx.get(f"{tables[0].url}/openapi.json").json()["components"]["schemas"]["Lookup"]
    assert {"offsets", "pooling", "weights"} <= set(lookup["properties"])
    assert lookup["properties"]["pooling"]["anyOf"][0]["enum"] == ["sum", "mean", "max"]
