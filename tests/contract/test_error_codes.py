"""Errors of the server and exceptions of the client are twins: each code crosses the wire and comes out as its own."""

from __future__ import annotations

from collections.abc import Iterator

import embstore_client
import pytest
from embstore_client._core.problem import parse_problem
from embstore_client._errors import BY_CODE, BY_STATUS

from embstore import errors
from server.http.problems import KINDS, MEDIA_TYPE, problem

HEADERS = {"content-type": MEDIA_TYPE.decode(), "x-request-id": "id"}
OWN_NAMES = {"BadRequest": "MalformedRequest", "StoreError": "Unavailable", "DeviceFailed": "Unavailable"}
"""Where the client's class is not called as the server's is."""


def raised(kind: type[errors.EmbstoreError] = errors.EmbstoreError) -> Iterator[type[errors.EmbstoreError]]:
    """Every error of the library that has a place in a reply."""
    for child in kind.__subclasses__():
        if child.code in KINDS:
            yield child
        yield from raised(child)


def test_both_sides_know_the_same_codes() -> None:
    """A code that only one side knows would be raised by its status alone, or never be sent."""
    assert BY_CODE.keys() == KINDS.keys()


@pytest.mark.parametrize("code", KINDS)
def test_a_code_comes_out_as_its_class_with_all_that_was_said(code: str) -> None:
    """The class is the code's own, one of its status; code, title, detail and facts are attributes."""
    status, body = problem(code, "why", "id", {"table": "item", "limit": 9})
    error = parse_problem(status, HEADERS, body)
    assert type(error) is BY_CODE[code]
    assert isinstance(error, BY_STATUS[status])
    kind = KINDS[code]
    assert (error.status, error.code, error.title, error.detail) == (kind.status, code, kind.title, "why")
    assert (error.table, error.limit, error.request_id) == ("item", 9, "id")


@pytest.mark.parametrize("kind", sorted(set(raised()), key=lambda kind: kind.__name__))
def test_an_error_of_the_server_has_a_twin_in_the_client(kind: type[errors.EmbstoreError]) -> None:
    """What the server raises is what the client raises, by a public class of the same name."""
    status, body = problem(kind.code, "why", "id")
    error = parse_problem(status, HEADERS, body)
    twin = getattr(embstore_client, OWN_NAMES.get(kind.__name__, kind.__name__))
    assert (type(error), error.code) == (twin, kind.code)
