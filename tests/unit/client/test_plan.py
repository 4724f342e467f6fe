"""What travels for a call: splitting past the limit, merging in order, one version and one release in every answer."""

from __future__ import annotations

import json
from typing import Any

import embstore_client
import numpy as np
import pytest
from embstore_client import Bags, ManyRows, ProtocolError, Rows, TooManyIds
from embstore_client._core.client_core import only
from embstore_client._core.planner import Planner
from embstore_client._core.protocol import Reply, build_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_cases import Fake, carry, infer_reply, pooled, vectors

DTYPES = ["float32", "float16", "bfloat16", "int8"]
IDS = st.lists(st.integers(0, 99), max_size=25)


def same(rows: Rows, table: str, version: int, ids: list[Any], offsets: list[int] | None = None) -> None:
    """These rows are exactly what a version of a table has for these ids."""
    expected = vectors(table, version, ids)
    wanted = expected if offsets is None else pooled(expected, offsets)
    # int8 is 255 steps from the least to the most of a row; the other types hold these numbers exactly.
    tolerance = wanted.max(initial=0) / 255 if rows.dtype == "int8" else 0
    np.testing.assert_allclose(rows.vectors, wanted, rtol=0, atol=tolerance)
    assert rows.found.tolist() == [(i % 7 != 6 if isinstance(i, int) else len(i) != 7) for i in ids]
    assert (rows.version, rows.missing) == (version, rows.found.tolist().count(False))


def test_a_call_within_the_limit_is_one_request() -> None:
    """Nothing is split that need not be, and the answer is the reply's own memory."""
    plan = Planner(max_ids=4).lookup("item", [1, 2, 3, 4])
    assert len(plan.requests) == 1
    body = np.arange(12, dtype="f4").tobytes()
    reply = Reply(200, Fake().send(plan.requests[0]).headers, body)
    rows = plan.merge([plan.requests[0].parse(reply)])
    assert isinstance(rows, Rows)
    assert np.shares_memory(rows.vectors, np.frombuffer(body, np.uint8))


@settings(max_examples=50)
@given(IDS, st.integers(1, 9), st.sampled_from(DTYPES))
def test_split_ids_come_back_whole_and_in_order(ids: list[int], limit: int, dtype: str) -> None:
    """However ids are split, each row is at its place, and no request is larger than the limit."""
    fake = Fake(version=3)
    rows = carry(Planner(max_ids=limit).lookup("item", ids, dtype=dtype), fake.send)
    same(rows, "item", 3, ids)
    assert max(fake.sizes) <= limit
    assert len(fake.sizes) == max(1, -(-len(ids) // limit))
    assert rows.request_id == ", ".join(f"q{n + 1}" for n in range(len(fake.sizes)))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=10), st.integers(4, 9), st.booleans())
def test_bags_are_split_at_their_borders(lengths: list[int], limit: int, swaps: bool) -> None:
    """No bag is cut in two, empty ones included, and each is at its place whatever version came in between."""
    offsets = [0, *np.cumsum(lengths).tolist()[:-1]]
    ids = list(range(sum(lengths)))
    fake = Fake(version=3, swaps={1: 4} if swaps else None)
    rows = carry(Planner(max_ids=limit).lookup("item", ids, offsets=offsets, pooling="sum"), fake.send)
    same(rows, "item", rows.version, ids, offsets)
    assert max(fake.sizes) <= limit


@settings(max_examples=50)
@given(IDS, st.integers(1, 9), st.integers(0, 6))
def test_pieces_of_two_versions_become_one(ids: list[int], limit: int, swap_at: int) -> None:
    """A version that comes between the pieces costs one more round, and the answer is of the newest alone."""
    fake = Fake(version=3, swaps={swap_at: 4})
    plan = Planner(max_ids=limit).lookup("item", ids, label="stable")
    rows = carry(plan, fake.send)
    first_round = len(plan.requests)
    same(rows, "item", 4 if swap_at < first_round else 3, ids)
    assert len(fake.requests) == first_round + (swap_at if 0 < swap_at < first_round else 0)
    assert all("/versions/4/" in request.target for request in fake.requests[first_round:])


def test_what_the_caller_does_to_its_arrays_meanwhile_changes_nothing() -> None:
    """Rows that are asked for again are those of the ids that the call was made with."""
    ids = np.arange(10)
    plan = Planner(max_ids=5).lookup("item", ids)
    ids[:] = 77
    same(carry(plan, Fake(version=1, swaps={1: 2}).send), "item", 2, list(range(10)))


def test_a_bag_too_large_for_any_request_is_named() -> None:
    """A bag cannot be cut: the error says which one, how large, and what the limit is."""
    planner = Planner(max_ids=4)
    for plan in (
        lambda: planner.lookup("item", range(9), offsets=[0, 2, 8]),
        lambda: planner.lookup_many({"user": [1, 2], "item": Bags(range(9), [0, 2, 8])}),
    ):
        with pytest.raises(TooManyIds, match="bag 1 has 6 ids, and one request takes 4") as raised:
            plan()
        assert (raised.value.table, raised.value.limit) == ("item", 4)


# Limits that the server teaches


def refusal(request: Any, **members: Any) -> embstore_client.ServiceError:
    problem = {"status": 413, "code": "too_many_ids"} | members
    reply = Reply(413, {"content-type": "application/problem+json"}, json.dumps(problem).encode())
    with pytest.raises(embstore_client.TooLarge) as raised:
        request.parse(reply)
    return raised.value


def test_a_limit_in_ids_is_learned_for_its_table() -> None:
    """After a 413 this call and the next are cut to the limit that it named, and other tables are not."""
    planner = Planner()
    plan = planner.lookup("item", range(100))
    error = refusal(plan.requests[0], limit=40)
    assert (error.table, error.asked) == ("item", 100)
    fake = Fake()
    for smaller in (plan.smaller(error), planner.lookup("item", range(100))):
        same(carry(smaller, fake.send), "item", 1, list(range(100)))
    assert fake.sizes == [34, 34, 32] * 2
    assert len(planner.lookup("user", range(100)).requests) == 1


@pytest.mark.parametrize("members", [{"limit": 1 << 26}, {"code": "body_too_large", "limit": 3}, {}], ids=str)
def test_a_limit_in_bytes_halves_until_it_fits(members: dict[str, Any]) -> None:
    """Where the limit is none of ids, half as many are tried each time, until a single one; the next call is whole."""
    planner = Planner()
    for call in (
        lambda: planner.lookup_many({"item": range(6), "user": range(6)}),
        lambda: planner.lookup("item", range(12)),
    ):
        plan: Any = call()
        for size in (12, 6, 3, 1):
            error = refusal(plan.requests[0], **members)
            assert error.asked == size
            if size > 1:
                plan = plan.smaller(error)
        with pytest.raises(embstore_client.TooLarge) as raised:
            plan.smaller(error)
        assert raised.value is error
        assert len(call().requests) == 1


def test_a_bag_that_no_reply_has_room_for_is_the_servers_error() -> None:
    """Half the ids are tried where the limit is in bytes; where a bag would be cut in two, the refusal is raised."""
    plan = Planner().lookup("item", range(9), offsets=[0, 2, 8])
    error = refusal(plan.requests[0], limit=1 << 26)
    with pytest.raises(TooManyIds) as raised:
        plan.smaller(error)
    assert raised.value is error


def test_a_refusal_from_elsewhere_is_raised() -> None:
    """A call is asked in smaller pieces only where the refusal is of what was sent; one without ids has none."""
    error = TooManyIds("far away", limit=3)
    for plan in (Planner().lookup("item", range(9)), only(build_tables())):
        with pytest.raises(TooManyIds):
            plan.smaller(error)


# Many tables


VALUES = st.dictionaries(
    st.sampled_from(["item", "user", "embstore", "item.offsets2"]),
    IDS | st.lists(st.sampled_from(["a", "bb", "seven-7"]), max_size=8),
    min_size=1,
)


@settings(max_examples=50)
@given(VALUES, st.integers(1, 30), st.sampled_from(["float32", "float16"]), st.none() | st.integers(1, 6))
def test_many_tables_are_split_and_joined(
    tables: dict[str, list[Any]], limit: int, dtype: str, swap_at: int | None
) -> None:
    """However a call for many tables is split, every table is whole, in order, and all are of one release."""
    fake = Fake(version=3, swaps={} if swap_at is None else {swap_at: 4})
    many = carry(Planner(max_ids=limit).lookup_many(tables, dtype=dtype), fake.send)
    assert isinstance(many, ManyRows)
    assert list(many) == list(tables)
    for table, ids in tables.items():
        same(many[table], table, int(str(many.release)), ids)
    assert max(fake.sizes) <= limit


def test_many_tables_travel_as_tensors() -> None:
    """One binary request for all tables, bags and keys among them, pinned to the release by its path."""
    fake = Fake()
    bags = Bags([1, 2, 3], [0, 2], "sum")
    plan = Planner(on_missing="default").lookup_many({"item": bags, "tag": ["a", "ö"]}, release="12")
    many = carry(plan, fake.send)
    (request,) = fake.requests
    assert request.target == "/v2/models/embstore/versions/12/infer"
    head = json.loads(request.body[: int(dict(request.headers)["inference-header-content-length"])])
    assert [(one["name"], one["datatype"], one["shape"]) for one in head["inputs"]] == [
        ("item", "INT64", [3]),
        ("item.offsets", "INT64", [2]),
        ("tag", "BYTES", [2]),
    ]
    assert head["parameters"]["on_missing"] == "default"
    assert head["parameters"]["item.pooling"] == "sum"
    assert many.release == "12"
    same(many["item"], "item", 12, [1, 2, 3], [0, 2])
    assert many["item"].vectors.flags.aligned
    assert not many["item"].vectors.flags.writeable


@pytest.mark.parametrize(
    ("tables", "options"),
    [
        ({"item": [1]}, {"dtype": "bfloat16"}),
        ({"item": [1]}, {"release": "r/1"}),
        ({"item": [1], "item.found": [2]}, {}),
    ],
    ids=["bfloat16", "release", "names"],
)
def test_what_tensors_cannot_say_travels_as_json(tables: dict[str, Any], options: dict[str, Any]) -> None:
    """A type, a release or a name that the binary protocol has no place for goes the other way."""
    (request,) = Planner().lookup_many(tables, **options).requests
    assert request.target.startswith("/v1/")
    assert json.loads(request.body)["tables"].keys() == tables.keys()


def answer_of(request: Any, change: str = "", **fields: Any) -> Reply:
    """A right binary answer to a call for `item` [1, 6] and `user` [2], with one thing changed."""
    right = Fake(version=3).send(request)
    at = int(right.headers["inference-header-content-length"])
    document = json.loads(right.body[:at])
    target = document
    for key in change.split(".") if change else []:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target.update(fields)
    head = json.dumps(document).encode()
    return Reply(200, right.headers | {"inference-header-content-length": str(len(head))}, head + right.body[at:])


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("", {"model_version": "4"}),
        ("", {"model_version": ""}),
        ("", {"model_version": 3}),
        ("", {"model_name": "item"}),
        ("", {"parameters": {"release": "4"}}),
        ("", {"parameters": {}}),
        ("", {"parameters": None}),
        ("", {"outputs": []}),
        ("", {"outputs": None}),
        ("outputs.0", {"name": "user"}),
        ("outputs.0", {"name": ["item"]}),
        ("outputs.0", {"datatype": "FP16"}),
        ("outputs.0", {"datatype": "BOOL"}),
        ("outputs.0", {"shape": [1, 6]}),
        ("outputs.0", {"shape": [6]}),
        ("outputs.0", {"shape": [2, -3]}),
        ("outputs.0", {"shape": [2, 1 << 62]}),
        ("outputs.0", {"shape": [2, 0]}),
        ("outputs.0", {"parameters": {"binary_data_size": 24, "version": 3, "missing": 0}}),
        ("outputs.0", {"parameters": {"binary_data_size": 24, "missing": 1}}),
        ("outputs.0", {"parameters": None}),
        ("outputs.0.parameters", {"version": 0}),
        ("outputs.0.parameters", {"version": "3"}),
        ("outputs.0.parameters", {"release": "4"}),
        ("outputs.0.parameters", {"binary_data_size": 23}),
        ("outputs.0.parameters", {"binary_data_size": 1 << 40}),
        ("outputs.1", {"shape": [3]}),
        ("outputs.1", {"datatype": "FP32"}),
    ],
    ids=str,
)
def test_mislabelled_tensors_are_refused(change: str, fields: dict[str, Any]) -> None:
    """Another release, two releases, or a tensor that is not what was asked for refuses the whole answer."""
    (request,) = Planner().lookup_many({"item": [1, 6], "user": [2]}, release="3").requests
    assert request.parse(answer_of(request)).release == "3"
    with pytest.raises(ProtocolError):
        request.parse(answer_of(request, change, **fields))


def test_a_header_of_another_release_is_refused() -> None:
    """Where the answer's header names another release than its body, nothing is returned."""
    (request,) = Planner().lookup_many({"item": [1]}).requests
    right = answer_of(request)
    with pytest.raises(ProtocolError, match="two releases"):
        request.parse(Reply(200, right.headers | {"x-embedding-release": "4"}, right.body))


@given(st.data())
def test_truncated_or_padded_tensors_are_refused(data: st.DataObject) -> None:
    """However much of a binary answer is lost or added, no vectors come out."""
    (request,) = Planner().lookup_many({"item": [1, 6], "user": [2]}).requests
    right = Fake(version=3).send(request)
    cut = data.draw(st.integers(0, len(right.body) - 1))
    for body in (right.body[:cut], right.body + bytes(cut + 1)):
        with pytest.raises(ProtocolError):
            request.parse(Reply(200, right.headers, body))
    with pytest.raises(ProtocolError):
        request.parse(infer_reply("3", [], [], extra=data.draw(st.binary(max_size=20))))


def test_pieces_without_a_release_that_never_agree_are_refused() -> None:
    """Tables of no release cannot be pinned: they are asked once more, and then the call fails."""
    (request,) = Planner().lookup_many({"item": [1, 2]}).requests
    plan = Planner(max_ids=1).lookup_many({"item": [1, 2]})

    def answers(*versions: int) -> list[ManyRows]:
        rows = request.parse(Fake(version=1).send(request))["item"]
        ones = [Rows(rows.vectors[:1], rows.found[:1], version, 0, "float32") for version in versions]
        return [ManyRows({"item": one}, release=None, request_id=None) for one in ones]

    assert isinstance(plan.merge(answers(1, 1)), ManyRows)
    again: Any = plan.merge(answers(1, 2))
    assert len(again.requests) == 2
    assert again.merge(answers(2, 2))["item"].version == 2
    with pytest.raises(ProtocolError, match="different versions twice"):
        again.merge(answers(2, 3))
