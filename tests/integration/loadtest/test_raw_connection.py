"""The raw engine's connections against servers that refuse, lie and hang up: what is counted is what happened."""

from __future__ import annotations

import itertools
import socket

import pytest
from support.driving import drive, scenario
from support.ill_server import CLOSE, RESET, Answer, reply, rows, scripted

from loadtest.errors import LoadError
from loadtest.generator.loops import Load
from loadtest.results.tally import Tally

GOODBYE = reply(b"bye", "503 Service Unavailable", connection="close")


def load(url: str, **fields: object) -> tuple[Load, Tally]:
    """A closed loop of bare sockets."""
    return drive(scenario(url, **({"engine": "raw", "mode": "closed", "connections": 2, "seconds": 0.3} | fields)))


def test_a_connection_that_the_server_ends_after_a_reply_is_no_error() -> None:
    """`connection: close` is obeyed, the reply counts, and the load goes on over a new connection."""
    with scripted(lambda _: GOODBYE) as url:
        made, total = load(url)
    assert total.errors == {}
    assert set(total.statuses) == {503}
    assert made.recorder.reconnects >= total.statuses[503] - 2 > 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (CLOSE, "closed"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", b"", CLOSE], "truncated"),
        (RESET, "reset"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nok", "protocol"),
        (b"HTTP/1.1 200 OK\r\n\r\nok", "protocol"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok", "protocol"),
        (b"EHLO there\r\ncontent-length: 0\r\n\r\n", "protocol"),
        (b"x" * 70_000, "protocol"),
    ],
    ids=[
        "closes",
        "closes amid",
        "resets",
        "more than it said",
        "no length",
        "a length of letters",
        "another protocol",
        "no end",
    ],
)
def test_what_is_no_reply_is_an_error_of_its_kind(answer: Answer, kind: str) -> None:
    """A reply that is not HTTP is one error of its kind, and every second request, which gets a good one, is not."""
    with scripted(lambda number: rows() if number % 2 else answer) as url:
        _, total = load(url, connections=1)
    assert set(total.errors) == {kind}
    assert set(total.statuses) == {200}
    assert total.errors[kind] > 1
    assert total.statuses[200] > 1


def test_a_reply_that_is_too_short_ends_by_timeout() -> None:
    """Fewer bytes than the reply's head promises are waited for until the timeout."""
    with scripted(lambda _: rows()[:-5]) as url:
        _, total = load(url, seconds=0.5, timeout=0.1)
    assert set(total.errors) == {"timeout"}
    assert total.statuses == {}


def test_replies_in_pieces_are_put_together() -> None:
    """A head in four parts and a body in two are one reply, and all bytes of its body are counted."""
    whole = rows()
    body = whole.index(b"\r\n\r\n") + 4
    ends = [0, 10, 40, body - 1, body, body + 7, len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(ends)]
    with scripted(lambda _: list[bytes | str](pieces)) as url:
        _, total = load(url, mode="open", rate=20.0, seconds=0.5)
    assert (total.statuses, total.errors) == ({200: 10}, {})
    assert total.num_bytes == 10 * (len(whole) - body)


def test_nobody_listening_is_one_line() -> None:
    """A LoadError says where nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(LoadError, match=f"cannot connect to 127.0.0.1:{port}: "):
            load(f"http://127.0.0.1:{port}")
