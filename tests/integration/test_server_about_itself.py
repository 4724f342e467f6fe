"""What a real server says of itself: tables, probes, metrics, documents, and refusals of what it does not have."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from embstore_client import EmbeddingClient, TableNotFound
from support.four_schemes import DIM, MODULES, NUM, four_schemes, post
from support.serving import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Four schemes under three kinds of ids."""
    with four_schemes(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_tables_describe_themselves(server: ServerProcess) -> None:
    """GET /v1/tables, one table, its versions: scheme, sizes, labels, state."""
    tables = {t["table"]: t for t in httpx.get(f"{server.url}/v1/tables").json()["tables"]}
    assert len(tables) == 12
    about = httpx.get(f"{server.url}/v1/tables/memcom-int64").json()
    assert (about["scheme"], about["id_space"], about["num_ids"], about["release"]) == ("memcom", "int64", NUM, "1")
    assert about["labels"] == {"latest": 1}
    assert about["num_bytes"] - about["id_space_bytes"] == MODULES["memcom"].num_bytes() + 4 * DIM
    versions = httpx.get(f"{server.url}/v1/tables/memcom-int64/versions").json()["versions"]
    assert [(v["version"], v["state"], v["reason"]) for v in versions] == [(1, "ready", None)]
    assert httpx.get(f"{server.url}/v1/tables/nothing").json()["code"] == "table_not_found"


def test_probes_metrics_and_documents_answer(server: ServerProcess) -> None:
    """Probes, Prometheus metrics and one OpenAPI document with the lookups in it."""
    for path in ("/livez", "/readyz", "/startupz", "/docs"):
        assert httpx.get(server.url + path).status_code == 200
    started, ready = httpx.get(f"{server.url}/startupz").json(), httpx.get(f"{server.url}/readyz").json()
    assert started == ready
    assert started["tables"]["full-dense"] == 1
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/tables/{table}/lookup", "/v1/lookup", "/v1/tables", "/readyz"} <= set(document["paths"])
    metrics = httpx.get(f"{server.url}/metrics").text
    for series in (
        'embstore_lookup_duration_seconds_bucket{le="5e-05",protocol="octet-stream",table="qr-dense"}',
        'embstore_ids_total{status="missing",table="hash-string"}',
        'embstore_version_info{scheme="qr",table="qr-dense",version="1"} 1.0',
        'embstore_table_bytes{device="cpu",table="full-dense",version="1"}',
        "embstore_lookup_ids_bucket",
        'embstore_rejected_total{reason="malformed"}',
        'embstore_version_loads_total{result="ok"} 12.0',
        "embstore_swaps_total 1.0",
        "embstore_inflight_requests 0.0",
    ):
        assert series in metrics


def test_metrics_count_what_was_served(server: ServerProcess) -> None:
    """Counters grow by exactly the ids that were asked for."""

    def count(status: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        name = f'embstore_ids_total{{status="{status}",table="hash-dense"}} '
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    found, missing = count("found"), count("missing")
    post(server, "hash-dense", {"ids": [1, 2, 3, NUM, -1]})
    assert (count("found") - found, count("missing") - missing) == (3, 2)


def test_unknown_paths_and_methods_are_problems(server: ServerProcess) -> None:
    """What is no call of this server is said to be none, in the same shape."""
    for reply, status in (
        (httpx.get(f"{server.url}/v2/nothing"), 404),
        (httpx.get(f"{server.url}/v1/tables/full-dense/lookup"), 405),
        (httpx.put(f"{server.url}/v1/tables"), 405),
    ):
        assert (reply.status_code, reply.headers["Content-Type"]) == (status, "application/problem+json")


def test_the_client_says_which_table_is_unknown(server: ServerProcess) -> None:
    """A server's refusal arrives as its typed twin."""
    with EmbeddingClient(server.url, timeout_s=30) as client, pytest.raises(TableNotFound) as caught:
        client.lookup("nothing", [1])
    assert caught.value.table == "nothing"


def test_store_folder_is_not_written_by_serving(server: ServerProcess) -> None:
    """A server only reads its store."""
    names = {path.name for path in server.store.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "arrays.safetensors", "latest.json", "1.json"}
