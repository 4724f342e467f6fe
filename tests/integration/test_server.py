"""The HTTP contract, against a real server process: right vectors, clear refusals, nothing harmed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from embstore_client import EmbeddingClient, IdOutOfRange
from support.four_schemes import DIM, KEYS, MODULES, NAMES, NUM, OCTETS, SPARSE_IDS, expected, four_schemes, post
from support.serving import ServerProcess, serving

import embstore


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Four schemes under three kinds of ids."""
    with four_schemes(tmp_path_factory.mktemp("server")) as running:
        yield running


ROWS = [0, NUM - 1, 3, 3, 250, 1]


@pytest.mark.parametrize("scheme", MODULES)
@pytest.mark.parametrize("kind", KEYS)
def test_json_vectors_are_the_modules(server: ServerProcess, scheme: str, kind: str) -> None:
    """Vectors read from JSON are bit for bit what the module computes."""
    reply = post(server, f"{scheme}-{kind}", {"ids": [KEYS[kind][row] for row in ROWS]})
    answer = reply.json()
    assert (reply.status_code, answer["version"], answer["dtype"]) == (200, 1, "float32")
    assert "found" not in answer
    np.testing.assert_array_equal(np.array(answer["vectors"], np.float32), expected(scheme, ROWS))


@pytest.mark.parametrize("scheme", MODULES)
@pytest.mark.parametrize("kind", KEYS)
def test_client_vectors_are_the_modules(server: ServerProcess, scheme: str, kind: str) -> None:
    """Vectors over the client (binary rows) are bit for bit what the module computes."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        rows = client.lookup(f"{scheme}-{kind}", [KEYS[kind][row] for row in range(NUM)])
    assert (rows.version, rows.release, rows.missing) == (1, "1", 0)
    np.testing.assert_array_equal(rows.vectors, expected(scheme, range(NUM)))


@pytest.mark.parametrize("scheme", MODULES)
@pytest.mark.parametrize("kind", ["dense", "int64"])
def test_octet_vectors_are_the_modules(server: ServerProcess, scheme: str, kind: str) -> None:
    """Raw bytes in, raw bytes out, nothing between."""
    ids = np.array([KEYS[kind][row] for row in ROWS], "<i8")
    reply = httpx.post(f"{server.url}/v1/tables/{scheme}-{kind}/lookup", content=ids.tobytes(), headers=OCTETS)
    assert reply.headers["X-Embedding-Shape"] == f"{len(ROWS)},{DIM}"
    assert reply.headers["X-Embedding-Version"] == "1"
    assert reply.content == expected(scheme, ROWS).tobytes()


def test_a_large_batch_is_answered_the_same_way(server: ServerProcess) -> None:
    """Tens of thousands of ids, looked up in a thread, give the same vectors as one by one."""
    rows = np.random.default_rng(0).integers(0, NUM, 60_000)
    with EmbeddingClient(server.url, timeout_s=30) as client:
        np.testing.assert_array_equal(client.lookup("qr-dense", rows).vectors, expected("qr", rows))


def test_many_tables_come_from_one_release(server: ServerProcess) -> None:
    """A lookup of many tables names the release and has every table's vectors."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        many = client.lookup_many({"full-dense": [1, 2], "memcom-string": [NAMES[5], "nobody"]})
        pinned = client.lookup_many({"full-dense": [1, 2]}, release="1")
    assert many.release == pinned.release == "1"
    np.testing.assert_array_equal(many["full-dense"].vectors, expected("full", [1, 2]))
    np.testing.assert_array_equal(many["memcom-string"].vectors[0], expected("memcom", [5])[0])
    assert many["memcom-string"].found.tolist() == [True, False]


@pytest.mark.parametrize("path", ["versions/1", "labels/latest"])
def test_versions_and_labels_are_paths(server: ServerProcess, path: str) -> None:
    """A version or label between table and verb pins what answers."""
    reply = httpx.post(f"{server.url}/v1/tables/qr-dense/{path}/lookup", json={"ids": [7]})
    assert reply.json()["version"] == 1


@pytest.mark.parametrize("kind", KEYS)
def test_missing_ids_are_reported_and_never_another_ids_vector(server: ServerProcess, kind: str) -> None:
    """Under every policy the found bits tell, and zero means zeros."""
    unknown: Any = "nobody" if kind == "string" else 1 << 40
    ids = [KEYS[kind][3], unknown, KEYS[kind][0]]
    with EmbeddingClient(server.url, timeout_s=30) as client:
        zero = client.lookup(f"full-{kind}", ids)
        default = client.lookup(f"full-{kind}", ids, on_missing="default")
        hashed = client.lookup(f"full-{kind}", ids, on_missing="hash")
        with pytest.raises(IdOutOfRange):
            client.lookup(f"full-{kind}", ids, on_missing="error")
    for rows in (zero, default, hashed):
        assert rows.found.tolist() == [True, False, True]
        np.testing.assert_array_equal(rows.vectors[[0, 2]], expected("full", [3, 0]))
    assert not zero.vectors[1].any()
    np.testing.assert_allclose(default.vectors[1], expected("full", range(NUM)).mean(axis=0), atol=1e-6)
    assert any(np.array_equal(hashed.vectors[1], row) for row in expected("full", range(NUM)))


def test_float16_halves_the_bytes(server: ServerProcess) -> None:
    """dtype=float16 rounds the same vectors."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        rows = client.lookup("full-dense", ROWS, dtype="float16")
    np.testing.assert_array_equal(rows.vectors, expected("full", ROWS).astype(np.float16))


BAD_JSON: dict[str, tuple[Any, int, str]] = {
    "malformed": (b'{"ids": [1, 2', 400, "malformed_request"),
    "not utf-8": (b'{"ids": ["\xff"]}', 400, "malformed_request"),
    "an array": (b"[1, 2]", 400, "malformed_request"),
    "no ids": (b"{}", 400, "malformed_request"),
    "unknown field": (b'{"ids": [1], "pool": "sum"}', 400, "malformed_request"),
    "float": (b'{"ids": [1, 2.5]}', 400, "malformed_request"),
    "whole float": (b'{"ids": [1.0]}', 400, "malformed_request"),
    "exponent": (b'{"ids": [1e3]}', 400, "malformed_request"),
    "bool": (b'{"ids": [true]}', 400, "malformed_request"),
    "null": (b'{"ids": [null]}', 400, "malformed_request"),
    "nested": (b'{"ids": [[1], [2]]}', 400, "malformed_request"),
    "NaN": (b'{"ids": [NaN]}', 400, "malformed_request"),
    "Infinity": (b'{"ids": [Infinity]}', 400, "malformed_request"),
    "past int64": (b'{"ids": [9223372036854775808]}', 422, "wrong_dtype"),
    "thousands of digits": (b'{"ids": [' + b"9" * 5_000 + b"]}", 400, "malformed_request"),
    "past int64 in words": (b'{"ids": ["-9223372036854775809"]}', 422, "wrong_dtype"),
    "a word": (b'{"ids": ["seven"]}', 422, "wrong_dtype"),
    "spaced number": (b'{"ids": [" 7"]}', 422, "wrong_dtype"),
    "deep": (b'{"ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "malformed_request"),
    "empty body": (b"", 400, "malformed_request"),
    "policy": (b'{"ids": [1], "on_missing": "guess"}', 422, "unprocessable"),
    "dtype": (b'{"ids": [1], "dtype": "float64"}', 422, "unprocessable"),
    "negative": (b'{"ids": [-1], "on_missing": "error"}', 422, "id_out_of_range"),
    "past the end": (b'{"ids": [500], "on_missing": "error"}', 422, "id_out_of_range"),
    "too many": (b'{"ids": [' + b",".join([b"1"] * 65_537) + b"]}", 413, "too_many_ids"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_a_clear_problem(server: ServerProcess, case: str) -> None:
    """Each malformed body gets a problem+json with the right status, and the next request is unharmed."""
    body, status, code = BAD_JSON[case]
    reply = post(server, "full-dense", body, **{"X-Request-ID": "abc-1"})
    problem = reply.json()
    assert (reply.status_code, problem["code"], problem["status"]) == (status, code, status)
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert problem["instance"] == reply.headers["X-Request-ID"] == "abc-1"
    assert {"type", "title", "detail"} <= set(problem)
    assert "Traceback" not in reply.text
    assert post(server, "full-dense", {"ids": [1]}).status_code == 200


def test_decimal_strings_are_integers(server: ServerProcess) -> None:
    """Ids that JSON numbers cannot carry safely come as strings."""
    reply = post(server, "full-int64", {"ids": [str(SPARSE_IDS[9]), SPARSE_IDS[8]]})
    np.testing.assert_array_equal(np.array(reply.json()["vectors"], np.float32), expected("full", [9, 8]))


def test_an_empty_list_is_an_empty_reply(server: ServerProcess) -> None:
    """No ids, no vectors, no error; in JSON and in bytes."""
    assert post(server, "full-dense", {"ids": []}).json()["vectors"] == []
    reply = httpx.post(f"{server.url}/v1/tables/full-dense/lookup", content=b"", headers=OCTETS)
    assert (reply.status_code, reply.content, reply.headers["X-Embedding-Shape"]) == (200, b"", f"0,{DIM}")


OCTET_CASES: dict[str, tuple[str, bytes, dict[str, str], int, str]] = {
    "not a multiple of 8": ("full-dense/lookup", b"123456789", OCTETS, 400, "malformed_request"),
    "string ids": ("full-string/lookup", bytes(8), OCTETS, 422, "wrong_dtype"),
    "content type": ("full-dense/lookup", bytes(8), {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
    "no content type": ("full-dense/lookup", bytes(8), {}, 415, "unsupported_media_type"),
    "policy": ("full-dense/lookup?on_missing=x", bytes(8), OCTETS, 422, "unprocessable"),
    "parameter": ("full-dense/lookup?missing=zero", bytes(8), OCTETS, 400, "malformed_request"),
    "error policy": ("full-dense/lookup?on_missing=error", b"\xff" * 8, OCTETS, 422, "id_out_of_range"),
    "table": ("nothing/lookup", bytes(8), OCTETS, 404, "table_not_found"),
    "table path": ("../../etc/passwd/lookup", bytes(8), OCTETS, 404, "not_found"),
    "version": ("full-dense/versions/9/lookup", bytes(8), OCTETS, 404, "version_not_found"),
    "version word": ("full-dense/versions/new/lookup", bytes(8), OCTETS, 400, "malformed_request"),
    "version zeros": ("full-dense/versions/001/lookup", bytes(8), OCTETS, 400, "malformed_request"),
    "label": ("full-dense/labels/canary/lookup", bytes(8), OCTETS, 404, "label_not_found"),
    "empty label": ("full-dense/labels//lookup", bytes(8), OCTETS, 404, "label_not_found"),
    "twice": ("full-dense/lookup?on_missing=error&on_missing=zero", bytes(8), OCTETS, 400, "malformed_request"),
    "encoded": (
        "full-dense/lookup",
        bytes(8),
        OCTETS | {"Content-Encoding": "gzip"},
        415,
        "unsupported_media_type",
    ),
    "upgrade": (
        "full-dense/lookup",
        bytes(8),
        OCTETS | {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQ"},
        400,
        "malformed_request",
    ),
    "query beside JSON": (
        "full-dense/lookup?on_missing=error",
        b'{"ids": [1]}',
        {"Content-Type": "application/json"},
        400,
        "malformed_request",
    ),
}


@pytest.mark.parametrize("case", OCTET_CASES)
def test_bad_octet_requests_are_clear_problems(server: ServerProcess, case: str) -> None:
    """Wrong bytes, types, tables, versions and labels are refused by name."""
    path, body, headers, status, code = OCTET_CASES[case]
    reply = httpx.post(f"{server.url}/v1/tables/{path}", content=body, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)


@pytest.mark.parametrize("media_type", ["Application/Octet-Stream", "application/octet-stream; charset=binary"])
def test_media_types_are_compared_as_the_standard_says(server: ServerProcess, media_type: str) -> None:
    """Case and parameters of a media type do not matter."""
    url = f"{server.url}/v1/tables/full-dense/lookup"
    assert httpx.post(url, content=bytes(8), headers={"Content-Type": media_type}).status_code == 200
    headers = {"Content-Type": "application/json", "Accept": "application/octet-stream, */*;q=0.1"}
    assert httpx.post(url, content=b'{"ids":[0]}', headers=headers).content == expected("full", [0]).tobytes()


def test_a_reply_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Wide vectors lower the number of ids: the reply that would be too large is never made."""
    embstore.open_store(tmp_path / "store").publish("wide", np.ones((2, 8192), np.float32))
    with serving(tmp_path / "store", tmp_path / "log", env={"EMBSTORE_MAX_REPLY_BYTES": "1000000"}) as small:
        url = f"{small.url}/v1/tables/wide/lookup"
        assert len(httpx.post(url, content=bytes(8 * 30), headers=OCTETS).content) == 30 * 4 * 8192
        refused = httpx.post(url, content=bytes(8 * 31), headers=OCTETS)
        assert (refused.status_code, refused.json()["code"], refused.json()["limit"]) == (413, "too_many_ids", 30)
        many = httpx.post(f"{small.url}/v1/lookup", json={"tables": {"wide": {"ids": [0] * 31}}})
        assert (many.status_code, many.json()["code"]) == (413, "too_many_ids")


def test_every_reply_carries_the_requests_id(server: ServerProcess) -> None:
    """Echoed or made, on lookups, on everything else and in problems."""
    given = {"X-Request-ID": "given-7"}
    for reply in (
        httpx.get(f"{server.url}/v1/tables", headers=given),
        httpx.get(f"{server.url}/nothing", headers=given),
        httpx.post(f"{server.url}/v1/tables/full-dense/lookup", content=bytes(8), headers=OCTETS | given),
    ):
        assert reply.headers["X-Request-ID"] == "given-7"
    made = httpx.get(f"{server.url}/nothing")
    assert made.json()["instance"] == made.headers["X-Request-ID"]
    assert "Location" not in httpx.get(f"{server.url}/v1/tables/").headers


def test_unknown_release_and_mixed_tables_are_not_found(server: ServerProcess) -> None:
    """A release that is not there, and a table that is not in it, are named."""
    body = {"tables": {"nothing": {"ids": [1]}}}
    assert httpx.post(f"{server.url}/v1/releases/9/lookup", json=body).json()["code"] == "release_not_found"
    assert httpx.post(f"{server.url}/v1/releases/1/lookup", json=body).json()["code"] == "table_not_found"
    assert httpx.post(f"{server.url}/v1/lookup", json={"tables": {}}).json()["code"] == "malformed_request"


def test_ten_million_ids_are_refused_with_memory_flat(server: ServerProcess) -> None:
    """80 MB of ids get 413, whether the size is announced or not, and the server does not grow."""
    before = server.memory_mib()
    url = f"{server.url}/v1/tables/full-dense/lookup"
    announced = httpx.post(url, content=bytes(80_000_000), headers=OCTETS, timeout=60)
    chunked = httpx.post(url, content=(bytes(1 << 20) for _ in range(80)), headers=OCTETS, timeout=60)
    for reply in (announced, chunked):
        assert (reply.status_code, reply.json()["code"], reply.json()["limit"]) == (413, "body_too_large", 4 << 20)
    assert server.memory_mib() - before < 40


def test_a_gigabyte_is_refused_before_it_is_read(server: ServerProcess) -> None:
    """A 1 GB body gets 413 from its headers alone; the connection stays usable and memory stays flat."""
    before = server.memory_mib()
    chunk = bytes(1 << 20)
    with httpx.Client(timeout=120) as client:
        headers = OCTETS | {"Content-Length": str(1 << 30)}
        url = f"{server.url}/v1/tables/full-dense/lookup"
        reply = client.post(url, content=(chunk for _ in range(1 << 10)), headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
        assert client.post(url, content=bytes(8), headers=OCTETS).status_code == 200
    assert server.memory_mib() - before < 40


def test_a_client_that_leaves_mid_body_harms_nobody(server: ServerProcess) -> None:
    """Half a body and a closed connection: the next request is answered, nothing is logged as a failure."""
    address = urlsplit(server.url)
    for _ in range(20):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(
                b"POST /v1/tables/full-dense/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 80\r\n"
                b"Content-Type: application/octet-stream\r\n\r\n" + bytes(40)
            )
    assert post(server, "full-dense", {"ids": [1]}).status_code == 200
    assert not [event for event in server.events() if event["event"] == "lookup failed"]
