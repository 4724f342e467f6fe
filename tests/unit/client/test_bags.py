"""Bags, encoded rows and many tables, as the client asks for them and a real server answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import embstore_client
import httpx
import numpy as np
import pytest
import torch
from embstore_client import Bags, NearCache, Rows
from embstore_client._core.planner import Planner
from embstore_client._core.protocol import Reply, Request, fold_headers
from embstore_client._core.query import query_of
from support.client_cases import carry
from support.serving import ServerProcess, serving

import embstore

NUM, DIM = 300, 8
ITEMS = np.random.default_rng(5).normal(size=(NUM, DIM)).astype(np.float32)
NAMES = [f"sku-{row}" for row in range(NUM)]
IDS = [3, 0, NUM - 1, 7, 3, 8]
OFFSETS = [0, 2, 2, 5]
WEIGHTS = [0.5, 1.5, 2.0, 0.25, 1.0, 3.0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two releases of a table of integers and one of strings, the second with the vectors above."""
    folder = tmp_path_factory.mktemp("bags")
    store = embstore.open_store(folder / "store")
    for factor in (2, 1):
        store.publish_release(
            {
                "item": embstore.Publication(ITEMS * factor),
                "tag": embstore.Publication(ITEMS * factor, ids=NAMES),
            }
        )
    with serving(folder / "store", folder / "log", max_ids=200) as running:
        url = f"{running.url}/v2/models/embstore/versions/1/ready"
        running.wait_until(lambda: httpx.get(url).status_code == 200, "the older release too")
        yield running


@pytest.fixture
def send(server: ServerProcess) -> Iterator[Any]:
    """Sends one request of a plan, by plain httpx."""
    with httpx.Client(base_url=server.url) as http:

        def sending(request: Request[Any]) -> Reply:
            sent = http.request(
                request.method, request.target, content=request.body, headers=dict(request.headers), timeout=30
            )
            return Reply(sent.status_code, fold_headers(sent.headers.raw), sent.content)

        yield sending


def pooled(pooling: str, weights: list[float] | None = None, dtype: str = "float32") -> torch.Tensor:
    """What torch makes of the bags above; it has no weighted mean, which is the weighted sum by the weights' sum."""
    rows, offsets = torch.from_numpy(ITEMS), torch.tensor(OFFSETS)
    if pooling == "mean" and weights is not None:
        ones = torch.ones_like(rows)
        total = [torch.nn.functional.embedding_bag(torch.tensor(IDS), table, offsets, mode="sum",
                 per_sample_weights=torch.tensor(weights)) for table in (rows, ones)]  # fmt: skip
        return torch.nan_to_num(total[0] / total[1])
    per_sample = None if weights is None else torch.tensor(weights)
    return torch.nn.functional.embedding_bag(
        torch.tensor(IDS), rows, offsets, mode=pooling, per_sample_weights=per_sample
    )


@pytest.mark.parametrize("keys", ["ids", "names"])
@pytest.mark.parametrize(
    ("pooling", "weights"),
    [("sum", None), ("mean", None), ("max", None), ("sum", WEIGHTS), ("mean", WEIGHTS)],
    ids=["sum", "mean", "max", "weighted-sum", "weighted-mean"],
)
def test_bags_are_what_torch_makes_of_them(send: Any, pooling: str, weights: list[float] | None, keys: str) -> None:
    """One vector a bag, empty ones included, whether one table is asked or many, whole or in pieces."""
    table, ids = ("item", IDS) if keys == "ids" else ("tag", [NAMES[i] for i in IDS])
    expected = pooled(pooling, weights).numpy()
    options = {"offsets": OFFSETS, "pooling": pooling, "weights": weights}
    for max_ids in (100, 4):
        planner = Planner(max_ids=max_ids)
        rows = carry(planner.lookup(table, ids, **options), send)
        np.testing.assert_allclose(rows.vectors, expected, rtol=1e-6)
        assert rows.found.tolist() == [True] * len(IDS)
        many = carry(planner.lookup_many({table: Bags(ids, **options), "item": Bags(IDS, **options)}), send)
        np.testing.assert_array_equal(many[table].vectors, rows.vectors)
        np.testing.assert_allclose(many["item"].vectors, expected, rtol=1e-6)


def test_found_is_of_ids_even_in_bags(send: Any) -> None:
    """Which ids a table does not know is said id by id, and they are left out of their bags."""
    planner = Planner()
    bags = Bags([3, NUM, 4], [0, 2])
    for rows in (
        carry(planner.lookup("item", bags.ids, offsets=bags.offsets), send),
        carry(planner.lookup_many({"item": bags}), send)["item"],
    ):
        assert rows.found.tolist() == [True, False, True]
        assert (rows.missing, len(rows)) == (1, 2)
        np.testing.assert_array_equal(rows.vectors, ITEMS[[3, 4]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rows_of_every_dtype_are_the_servers(send: Any, dtype: str) -> None:
    """Rows of ids, keys and bags decode to what the type holds of the vectors, from the cache as from the server."""
    planner = Planner(near_cache=NearCache(1 << 20))
    span = (ITEMS.max(axis=1) - ITEMS.min(axis=1)).max()
    atol = {"float32": 0.0, "float16": 2e-3, "bfloat16": 2e-2, "int8": span / 255}[dtype]
    for _ in range(2):
        rows: Rows = carry(planner.lookup("item", IDS, dtype=dtype), send)
        np.testing.assert_allclose(rows.vectors, ITEMS[IDS], atol=atol, rtol=0)
        assert rows.vectors.dtype == (np.float16 if dtype == "float16" else np.float32)
        tensor = rows.torch()
        assert tensor.dtype == {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
        assert tensor.float().tolist() == rows.vectors.astype(np.float32).tolist()
        memory = rows.vectors if dtype != "bfloat16" or rows.encoded is None else rows.encoded
        assert tensor.data_ptr() == memory.__array_interface__["data"][0]
    keys = carry(planner.lookup("tag", [NAMES[i] for i in IDS], dtype=dtype), send)
    np.testing.assert_array_equal(keys.vectors, rows.vectors)
    assert planner.near_cache is not None
    assert planner.near_cache.hits == len(IDS)
    bags = carry(planner.lookup("item", IDS, dtype=dtype, offsets=[0, 1, 2, 3, 4, 5]), send)
    np.testing.assert_array_equal(bags.vectors, rows.vectors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_many_tables_of_one_release(send: Any, dtype: str) -> None:
    """Integers, keys and no ids at all in one call; the release is the newest one, or the one that is pinned."""
    planner = Planner(max_ids=100)
    for release, factor in ((None, 1), ("1", 2)):
        asked = {"item": IDS, "tag": [NAMES[4], "no such"]}
        many = carry(planner.lookup_many(asked, release=release, dtype=dtype), send)
        assert many.release == ("2" if release is None else "1")
        np.testing.assert_allclose(many["item"].vectors, ITEMS[IDS] * factor, atol=4e-2)
        np.testing.assert_allclose(many["tag"].vectors[0], ITEMS[4] * factor, atol=4e-2)
        assert many["tag"].found.tolist() == [True, False]
        assert {rows.version for rows in many.values()} == {int(many.release)}
        assert {rows.release for rows in many.values()} == {many.release}
    none = carry(planner.lookup_many({"item": [], "tag": np.empty(0, np.object_)}, dtype=dtype), send)
    assert [rows.vectors.shape for rows in none.values()] == [(0, DIM), (0, DIM)]


def test_a_servers_limit_is_learned(send: Any) -> None:
    """A server that takes fewer ids than the client thought teaches it, and the call goes through in pieces."""
    ids = np.arange(NUM)
    for many in (False, True):
        planner = Planner()
        plan: Any = planner.lookup_many({"item": ids}) if many else planner.lookup("item", ids)
        with pytest.raises(embstore_client.TooManyIds) as refused:
            carry(plan, send)
        answer = carry(plan.smaller(refused.value), send)
        np.testing.assert_array_equal((answer["item"] if many else answer).vectors, ITEMS)


def test_errors_of_tensors_have_their_classes(send: Any) -> None:
    """A refused binary call raises what a refused JSON call does."""
    planner = Planner(on_missing="error")
    with pytest.raises(embstore_client.IdOutOfRange):
        carry(planner.lookup_many({"item": [NUM]}), send)
    with pytest.raises(embstore_client.TableNotFound):
        carry(planner.lookup_many({"nothing": [1]}), send)
    with pytest.raises(embstore_client.ReleaseNotFound):
        carry(planner.lookup_many({"item": [1]}, release="99"), send)


@pytest.mark.parametrize(
    ("bags", "error", "message"),
    [
        (Bags([1, 2], [1]), ValueError, r"offsets\[0\] is 1"),
        (Bags([1, 2], [0, 2, 1]), ValueError, r"offsets\[2\] is 1, less than 2"),
        (Bags([1, 2], [0, 3]), ValueError, r"offsets\[1\] is 3, past the end of 2 ids"),
        (Bags([1, 2], []), ValueError, "offsets is empty"),
        (Bags([1, 2], [0.5]), TypeError, "got float"),
        (Bags([1, 2], ["0"]), TypeError, "offsets must be integers"),
        (Bags([1, 2], [0], "median"), ValueError, "one of sum, mean, max"),
        (Bags([1, 2], [0], "max", [1, 2]), ValueError, "takes no weights"),
        (Bags([1, 2], [0], "sum", [1]), ValueError, "one number for each of 2 ids"),
        (Bags([1, 2], [0], "sum", [1, np.inf]), ValueError, r"weights\[1\] is inf"),
        (Bags([1, 2], [0], "sum", [1, 1e39]), ValueError, r"weights\[1\] is 1e\+39"),
        (Bags([1, 2], [0], "sum", ["1", "2"]), TypeError, "weights must be numbers"),
        (Bags([1.5], [0]), TypeError, "ids must"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bags_that_make_no_sense_are_refused(bags: Bags, error: type[Exception], message: str) -> None:
    """Offsets, weights and poolings that no server could answer raise before anything is sent."""
    with pytest.raises(error, match=message):
        query_of(bags)
    with pytest.raises(error, match=message):
        Planner().lookup("item", bags.ids, offsets=bags.offsets, pooling=bags.pooling, weights=bags.weights)


def test_bags_need_offsets() -> None:
    """A pooling or weights alone say nothing of bags."""
    for options in ({"pooling": "sum"}, {"weights": [1.0]}):
        with pytest.raises(ValueError, match="without offsets"):
            Planner().lookup("item", [1], **options)


def test_without_torch_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch()` where torch is not installed names what is missing, and what does without."""
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = Rows(np.zeros((1, 2), np.float32), np.ones(1, np.bool_), 1, 0, "float32")
    with pytest.raises(ImportError, match=r"needs torch.*Rows\.vectors"):
        rows.torch()
