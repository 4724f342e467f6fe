"""Requests as a load test sends them, against a real server; and replies that are not the answer, told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec.structs import replace
from support.serving import serving

import embstore
from embstore.publish.publication import Publication
from loadtest.errors import ScenarioError
from loadtest.scenario.model import IdDistribution, RequestSpec, Scenario
from loadtest.scenario.target import list_tables
from loadtest.workload.requests import PreparedRequest, prepare
from loadtest.workload.response_check import ResponseCheck, row_bytes

NUM, DIM = 50, 6
WORDS = [f"word-{n}é" for n in range(NUM)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of tables item and user in one release, and word, whose ids are strings."""
    root = tmp_path_factory.mktemp("requests")
    store = embstore.open_store(root / "store")
    vectors = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
    store.publish_release({"item": Publication(vectors), "user": Publication(vectors)}, label="stable")
    for table in ("item", "user"):
        store.set_label(table, "latest", 1)
    store.publish("word", vectors, ids=WORDS)
    with serving(root / "store", root / "log") as server, httpx.Client(base_url=server.url) as made:
        yield made


def send(client: httpx.Client, request: PreparedRequest) -> httpx.Response:
    """The reply of the server."""
    return client.request(request.method, request.target, content=request.body, headers=list(request.headers))


SINGLE = [
    *(RequestSpec(protocol="octet", dtype=dtype) for dtype in ("float32", "float16", "bfloat16", "int8")),
    *(RequestSpec(protocol="json", dtype=dtype) for dtype in ("float32", "float16", "bfloat16")),
    *(RequestSpec(protocol="infer", dtype=dtype) for dtype in ("float32", "float16")),
    *(RequestSpec(protocol=protocol, version="1") for protocol in ("octet", "json", "infer")),
    *(RequestSpec(protocol=protocol, label="stable") for protocol in ("octet", "json")),
    *(RequestSpec(protocol=protocol, on_missing="default") for protocol in ("octet", "json", "infer")),
]
MANY = [
    *(RequestSpec(protocol=protocol, tables=("item", "user")) for protocol in ("json", "infer")),
    *(RequestSpec(protocol=protocol, tables=("user", "item"), release="1") for protocol in ("json", "infer")),
]


def named(spec: RequestSpec) -> str:
    """An id for pytest."""
    extra = [spec.dtype, spec.version, spec.label, spec.release, spec.on_missing]
    return "-".join([spec.protocol, *spec.tables, *filter(None, extra)])


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("spec", SINGLE + MANY, ids=named)
def test_the_server_answers_what_was_asked(client: httpx.Client, spec: RequestSpec, count: int) -> None:
    """Every form of request is understood; its reply is found right, with or without body, and its version is read."""
    ids = [np.arange(count, dtype=np.int64) + place for place in range(len(spec.tables))]
    request = prepare(spec, ids)
    assert request.num_ids == count * len(spec.tables)
    reply = send(client, request)
    assert reply.status_code == 200, reply.text
    body = reply.content
    assert request.expect.problem(200, reply.headers, body) is None
    assert request.expect.problem(200, reply.headers, None, len(body)) is None
    whole = "release" if len(spec.tables) > 1 else spec.tables[0]
    assert request.expect.version(reply.headers, body) == (whole, "1")


@pytest.mark.parametrize("protocol", ["octet", "json", "infer"])
def test_ids_that_are_missing_make_no_reply_wrong(client: httpx.Client, protocol: Any) -> None:
    """Found bits behind the rows, and lists of them in JSON, are part of a right answer."""
    request = prepare(RequestSpec(protocol=protocol), [np.array([1, NUM, -5, 2], np.int64)])
    reply = send(client, request)
    assert reply.status_code == 200
    assert request.expect.problem(200, reply.headers, reply.content) is None


@pytest.mark.parametrize("protocol", ["json", "infer"])
def test_strings_are_asked_for_too(client: httpx.Client, protocol: Any) -> None:
    """Ids of strings travel in JSON and as BYTES, and are all found."""
    spec = RequestSpec(protocol=protocol, tables=("word",), on_missing="error")
    request = prepare(spec, [np.array(WORDS[:3] + [WORDS[-1]], object)])
    reply = send(client, request)
    assert reply.status_code == 200, reply.text
    assert request.expect.problem(200, reply.headers, reply.content) is None


def test_strings_cannot_be_made_up(client: httpx.Client) -> None:
    """A table of string ids, and no file of them: said before any load, with what to do."""
    asked = Scenario(
        url=str(client.base_url), requests=(RequestSpec(), RequestSpec(protocol="json", tables=("item", "word")))
    )
    with pytest.raises(ScenarioError, match=r"^requests.1.ids.file: the ids of table word are strings: name a Parquet"):
        list_tables(asked)
    alone = replace(asked, requests=(RequestSpec(tables=("word",)),))
    flags = "--set requests.0.ids.file=FILE --set requests.0.ids.column=NAME --set requests.0.protocol=json"
    with pytest.raises(ScenarioError, match=rf"\({flags}\); or use another table: --table item$"):
        list_tables(alone)
    of_file = replace(asked.requests[1], ids=IdDistribution(file="words.parquet", column="word"))
    assert list_tables(replace(asked, requests=(of_file,))) == {"item": NUM, "word": NUM}


def test_octets_carry_no_strings() -> None:
    """A request that cannot be made says which protocols can."""
    with pytest.raises(ScenarioError, match="strings, octet carries integers: use json or infer"):
        prepare(RequestSpec(tables=("word",)), [np.array(WORDS, object)])


def test_wire_is_the_request_as_http() -> None:
    """The bytes for a socket have the server's name, further headers, and the length of the body."""
    request = prepare(RequestSpec(dtype="int8", version="3"), [np.array([1, 2], np.int64)])
    head, _, body = request.wire("host:1", [("x-api-key", "k")]).partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "POST /v1/tables/item/versions/3/lookup?dtype=int8 HTTP/1.1",
        "host: host:1",
        "content-type: application/octet-stream",
        "x-api-key: k",
        "content-length: 16",
    ]
    assert body == np.array([1, 2], "<i8").tobytes()


def octet(rows: int = 10, dim: int = 4, missing: int = 0, **changed: str) -> tuple[dict[str, str], bytes]:
    """A reply of rows."""
    headers = {
        "content-type": "application/octet-stream",
        "x-embedding-version": "7",
        "x-embedding-shape": f"{rows},{dim}",
        "x-embedding-dtype": "float32",
        "x-embedding-missing": str(missing),
    }
    body = bytes(rows * row_bytes(dim, "float32") + (-(-rows // 8) if missing else 0))
    return headers | {name.replace("_", "-"): value for name, value in changed.items()}, body


OCTETS = ResponseCheck(protocol="octet", tables=("item",), counts=(10,))
WRONG_ROWS = [
    (octet(9), "expected 10 rows, got X-Embedding-Shape 9,4"),
    (octet(x_embedding_shape=""), "expected 10 rows, got no X-Embedding-Shape"),
    (octet(x_embedding_shape="10,-4"), "expected 10 rows, got X-Embedding-Shape 10,-4"),
    (octet(x_embedding_dtype="float16"), "expected float32, got X-Embedding-Dtype float16"),
    (octet(x_embedding_version="8"), "expected version 7, got X-Embedding-Version 8"),
    (octet(x_embedding_version=""), "expected version 7, got no X-Embedding-Version"),
    (octet(content_type="text/html"), "expected application/octet-stream, got Content-Type text/html"),
    ((octet()[0], octet(9)[1]), "10 rows of 4 float32 take 160 bytes, got 144"),
    ((octet()[0], octet(missing=1)[1]), "10 rows of 4 float32 take 160 bytes, got 162"),
    ((octet(missing=1)[0], octet()[1]), "10 rows of 4 float32 take 162 bytes, got 160"),
]


@pytest.mark.parametrize(("reply", "message"), WRONG_ROWS, ids=[message for _, message in WRONG_ROWS])
def test_wrong_rows_are_told(reply: tuple[dict[str, str], bytes], message: str) -> None:
    """Each way in which octets are not the answer has its words, whether or not the body was kept."""
    expect = ResponseCheck(protocol="octet", tables=("item",), counts=(10,), pinned="7")
    headers, body = reply
    assert expect.problem(200, headers, body) == f"mislabelled: {message}"
    assert expect.problem(200, headers, None, len(body)) == f"mislabelled: {message}"


def test_errors_of_the_server_are_no_wrong_answers() -> None:
    """What is not 2xx is counted by its status, whatever it carries."""
    assert OCTETS.problem(503, {}, b"") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"table":"item","version":7,"vectors":[[1],[2]]}', "expected 3 vectors, got JSON of 2"),
        ('{"table":"item","version":7,"vectors":[[1],[2],[3]]', "expected 3 vectors, got JSON of 3"),
        (
            '{"table":"user","version":7,"vectors":[[1],[2],[3]]}',
            "expected table item, got a body that does not name it",
        ),
        ('{"table":"item","vectors":[[1],[2]],"found":[true]}', "expected 3 vectors, got JSON of 2"),
    ],
    ids=["fewer", "cut", "another table", "found is no vector"],
)
def test_wrong_json_is_told(text: str, message: str) -> None:
    """JSON of other tables or with fewer vectors is not the answer."""
    expect = ResponseCheck(protocol="json", tables=("item",), counts=(3,))
    headers = octet(3)[0]
    assert expect.problem(200, headers, text.encode()) == f"mislabelled: {message}"


def test_another_release_is_told() -> None:
    """Rows of a release that was not asked for are not the answer."""
    expect = ResponseCheck(protocol="json", tables=("item", "user"), counts=(1, 1), pinned="4")
    said = expect.problem(200, {"x-embedding-release": "5"}, b"{}")
    assert said == "mislabelled: expected release 4, got X-Embedding-Release 5"


def inferred(size: int | None = None, model: str = "item", version: str = "7", **output: Any) -> tuple[Any, bytes]:
    """An inference reply of 2 rows of 3."""
    shape, datatype = output.get("shape", [2, 3]), output.get("datatype", "FP32")
    size = 24 if size is None else size
    entry = {"name": output.get("name", "embeddings"), "datatype": datatype, "shape": shape}
    entry["parameters"] = {"binary_data_size": size}
    head = json.dumps({"model_name": model, "model_version": version, "outputs": [entry]}).encode()
    return {"inference-header-content-length": str(len(head))}, head + bytes(24)


def headed(head: bytes) -> tuple[dict[str, str], bytes]:
    """An inference reply of this head alone."""
    return {"inference-header-content-length": str(len(head))}, head


WRONG_OUTPUTS = [
    (inferred(model="user"), "expected model item 7, got user 7"),
    (inferred(version="8"), "expected model item 7, got item 8"),
    (inferred(name="found"), "expected output embeddings, got found"),
    (inferred(shape=[1, 6]), "expected 2 rows of FP32, got shape [1, 6] of FP32"),
    (inferred(datatype="FP16"), "expected 2 rows of FP32, got shape [2, 3] of FP16"),
    (inferred(12), "shape [2, 3] of FP32 does not take 12 bytes"),
    (inferred(32, shape=[2, 4]), "outputs take 8 bytes more than the body has"),
    (inferred(16, shape=[2, 2]), "outputs take 8 bytes less than the body has"),
    (inferred(0, shape=[2, 0]), "expected 2 rows of FP32, got shape [2, 0] of FP32"),
    (inferred(24, shape=[2, 3.0]), "expected 2 rows of FP32, got shape [2, 3.0] of FP32"),
    (inferred(model="\ud800\n\x1b" + "x" * 100), f"expected model item 7, got \\ud800\\n\\x1b{'x' * 77} 7"),
    (headed(b"[" * 200_000), "expected an answer, got a reply that cannot be read: RecursionError"),
    (headed(b"[" + b"9" * 5000 + b"]"), "expected an inference reply, got a head that is none"),
    (
        ({"inference-header-content-length": "9" * 5000}, b"{}"),
        f"expected binary outputs, got Inference-Header-Content-Length {'9' * 80}",
    ),
    (({}, b"{}"), "expected binary outputs, got no Inference-Header-Content-Length"),
    (({"inference-header-content-length": "9"}, b"[1,2,3]{}"), "expected an inference reply, got a head that is none"),
]


@pytest.mark.parametrize(("reply", "message"), WRONG_OUTPUTS, ids=[message[:80] for _, message in WRONG_OUTPUTS])
def test_wrong_outputs_are_told(reply: tuple[dict[str, str], bytes], message: str) -> None:
    """Each way in which an inference reply is not the answer has its words."""
    expect = ResponseCheck(protocol="infer", tables=("item",), counts=(2,), pinned="7")
    assert expect.problem(200, *reply) == f"mislabelled: {message}"
