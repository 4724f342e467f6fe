"""An error answer becomes the exception that is its twin."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from typing import Any

import embstore_client
import pytest
from embstore_client import _errors
from embstore_client._core.problem import parse_problem
from embstore_client._core.protocol import Reply, build_lookup, build_lookup_many, build_ready, build_tables
from embstore_client._errors import BY_CODE, BY_STATUS
from hypothesis import given
from hypothesis import strategies as st

CODES = {
    "malformed_request": (400, "MalformedRequest"),
    "method_not_allowed": (405, "MalformedRequest"),
    "head_too_large": (431, "MalformedRequest"),
    "unauthorized": (401, "Unauthorized"),
    "forbidden": (403, "Forbidden"),
    "not_found": (404, "NotFound"),
    "table_not_found": (404, "TableNotFound"),
    "version_not_found": (404, "VersionNotFound"),
    "label_not_found": (404, "LabelNotFound"),
    "release_not_found": (404, "ReleaseNotFound"),
    "conflict": (409, "Conflict"),
    "too_many_ids": (413, "TooManyIds"),
    "body_too_large": (413, "BodyTooLarge"),
    "unsupported_media_type": (415, "UnsupportedMediaType"),
    "unprocessable": (422, "Unprocessable"),
    "id_out_of_range": (422, "IdOutOfRange"),
    "wrong_dtype": (422, "WrongDtype"),
    "overloaded": (429, "Overloaded"),
    "internal": (500, "InternalError"),
    "not_ready": (503, "NotReady"),
    "draining": (503, "Draining"),
    "store_failed": (503, "Unavailable"),
    "device_failed": (503, "Unavailable"),
    "deadline_exceeded": (504, "DeadlineExceeded"),
    "request_timeout": (408, "DeadlineExceeded"),
}


def problem(status: int, headers: dict[str, str] | None = None, **members: Any) -> embstore_client.ServiceError:
    all_headers = {"content-type": "application/problem+json", **(headers or {})}
    return parse_problem(status, all_headers, json.dumps(members).encode())


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_its_class(code: str) -> None:
    """Each code of the contract raises its own class, which a handler of its status's class catches too."""
    status, name = CODES[code]
    error = problem(status, code=code, title="T", detail="D")
    assert type(error) is getattr(embstore_client, name)
    assert isinstance(error, BY_STATUS[status])
    assert (error.status, error.code, error.title, error.detail) == (status, code, "T", "D")


def test_no_code_is_missing_from_this_list() -> None:
    """The list above is the whole mapping."""
    assert {code: cls.__name__ for code, cls in BY_CODE.items()} == {code: name for code, (_, name) in CODES.items()}


@pytest.mark.parametrize(("status", "cls"), BY_STATUS.items(), ids=str)
def test_an_unknown_code_falls_back_to_the_status(status: int, cls: type[Exception]) -> None:
    """A newer server's code, or none at all, still raises the class of its status."""
    assert type(problem(status, code="from_the_future")) is cls
    assert type(problem(status)) is cls


@pytest.mark.parametrize("status", [402, 418, 451, 501, 599, 799])
def test_an_unknown_status_is_a_plain_service_error(status: int) -> None:
    """Where neither code nor status is known, the base class carries what there is."""
    error = problem(status, code="odd", detail="D")
    assert type(error) is embstore_client.ServiceError
    assert (error.status, error.code, error.detail) == (status, "odd", "D")


def test_the_facts_are_carried() -> None:
    """Table, version, limit, request id and the wait asked for are attributes; the message names the rest."""
    error = problem(
        413,
        {"x-request-id": "q-1", "retry-after": "2"},
        code="too_many_ids",
        detail="20,000 ids in one call",
        table="item",
        version=7,
        limit=16384,
    )
    assert (error.table, error.version, error.limit) == ("item", 7, 16384)
    assert (error.request_id, error.retry_after_s) == ("q-1", 2.0)
    assert str(error) == "20,000 ids in one call (413, too_many_ids, request q-1)"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        (
            {"retry-after": "Wed, 01 May 2024 10:00:30 GMT", "date": "Wed, 01 May 2024 10:00:00 GMT"},
            30.0,
        ),
        ({"retry-after": "Wed, 01 May 2024 09:00:00 GMT", "date": "Wed, 01 May 2024 10:00:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 01 May 2024 10:00:30 GMT"}, None),
        ({"retry-after": "Wed, 01 May 2024 10:00:30 GMT", "date": "Wed, 01 May 2024 10:00:00"}, None),
    ],
    ids=str,
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    """`Retry-After` is understood in both forms of HTTP, a date against the answer's own clock."""
    assert problem(429, headers).retry_after_s == seconds


@pytest.mark.parametrize(
    ("headers", "body", "detail"),
    [
        (
            {"content-type": "text/html"},
            b"<html>\n <h1>502  Bad Gateway</h1></html>",
            "not an embstore answer but text/html: <html> <h1>502 Bad Gateway</h1></html>",
        ),
        ({}, b"", ""),
        (
            {"content-type": "application/problem+json"},
            b"{",
            "not an embstore answer but application/problem+json: {",
        ),
        ({"content-type": "application/problem+json"}, b"[" * 100_000, "not an embstore answer but"),
        ({"content-type": "application/problem+json"}, b"[]", "not an embstore answer but"),
        ({"content-type": "text/html"}, b"x" * 10_000, "not an embstore answer but"),
        ({"content-type": "application/octet-stream"}, b"\xff\xfe", "not an embstore answer but"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_proxys_page_is_an_error_too(headers: dict[str, str], body: bytes, detail: str) -> None:
    """An error body that is no problem document still raises by status, with a short excerpt."""
    error = parse_problem(502, headers, body)
    assert type(error) is embstore_client.Unavailable
    assert (error.code, error.title) == ("", "Bad Gateway")
    assert error.detail.startswith(detail)
    assert len(str(error)) < 300


def test_members_of_the_wrong_type_are_left_out() -> None:
    """A problem document with odd members is read for the rest."""
    error = problem(404, code=7, title=[], detail=None, table={}, version="7", limit=True)
    assert type(error) is embstore_client.NotFound
    assert (error.code, error.title, error.detail) == ("", "Not Found", "")
    assert (error.table, error.version, error.limit) == (None, None, None)


@given(
    st.integers(400, 999),
    st.binary(max_size=50),
    st.dictionaries(st.sampled_from(["content-type", "retry-after", "date"]), st.text(max_size=20)),
)
def test_no_error_body_can_crash_the_reader(status: int, body: bytes, headers: dict[str, str]) -> None:
    """Whatever an error answer holds, a ServiceError comes out."""
    error = parse_problem(status, headers, body)
    assert error.status == status
    assert str(error)


@pytest.mark.parametrize(
    "request_",
    [
        build_lookup("item", [1]),
        build_lookup("item", ["a"]),
        build_lookup_many({"item": [1]}),
        build_tables(),
    ],
)
def test_every_call_raises_the_twin(request_: Any) -> None:
    """Each call reads errors alike."""
    body = json.dumps({"code": "table_not_found", "table": "item"}).encode()
    with pytest.raises(embstore_client.TableNotFound) as raised:
        request_.parse(Reply(404, {"content-type": "application/problem+json"}, body))
    assert raised.value.table == "item"


def test_ready_raises_where_there_is_no_embstore() -> None:
    """A 404 under /readyz is not "not ready": something else answers there."""
    with pytest.raises(embstore_client.NotFound):
        build_ready().parse(Reply(404, {"content-type": "text/html"}, b"nothing here"))


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_cross_process_borders_whole(copied: Any) -> None:
    """An error raised in a worker process arrives with its facts."""
    error = copied(problem(413, {"retry-after": "2"}, code="too_many_ids", limit=5))
    assert type(error) is embstore_client.TooManyIds
    assert (error.limit, error.retry_after_s, str(error)) == (
        5,
        2.0,
        "Content Too Large (413, too_many_ids)",
    ) or (
        error.title == "Request Entity Too Large"  # its name before Python 3.13
    )
    timeout = copied(embstore_client.Timeout("late", timeout_s=0.5))
    assert (str(timeout), timeout.timeout_s) == ("late", 0.5)


def test_every_error_is_public_documented_and_under_one_base() -> None:
    """Every class is exported, derives from EmbstoreError, and its docstring says what to do about it."""
    classes = [cls for cls in vars(_errors).values() if inspect.isclass(cls)]
    assert len(classes) > 20
    for cls in classes:
        assert issubclass(cls, embstore_client.EmbstoreError)
        assert cls.__name__ in embstore_client.__all__
        assert ":" in (cls.__doc__ or "").splitlines()[0]
