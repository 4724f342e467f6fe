"""What no well-behaved client sends: each is refused or answered exactly, and nobody else notices."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator

import pytest
from support.hostile import NUM, WIDE_VD, Answer, Wire, guarded, is_right, lookup, octets, request, unharmed
from support.serving import ServerProcess

MAX_BODY = 100_000
LOOKUP = "/v1/tables/item/lookup"
OCTETS = "application/octet-stream"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that takes bodies of 100 kB."""
    folder = tmp_path_factory.mktemp("hostile")
    with guarded(folder, max_body_bytes=MAX_BODY) as running:
        for _ in range(3):  # large replies take their memory now
            with Wire(running) as wire:
                wire.send(lookup([1] * 1000, "wide")).answer()
        yield running


@pytest.fixture(autouse=True)
def _unharmed(server: ServerProcess) -> Iterator[None]:
    """After each test: right answers, no descriptor left open, memory flat, no error in the log."""
    with unharmed(server):
        yield


def test_leaving_in_the_middle_of_a_body(server: ServerProcess) -> None:
    """Half a head or half a body and a closed or reset connection harm nobody."""
    whole = lookup(list(range(50)))
    for cut in (1, 30, whole.index(b"\r\n\r\n") + 2, len(whole) - 200, len(whole) - 1):
        for rude in (False, True):
            wire = Wire(server).send(whole[:cut])
            wire.reset() if rude else wire.close()


def test_leaving_in_the_middle_of_a_reply(server: ServerProcess) -> None:
    """Sixteen megabytes nobody reads to the end are dropped with the connection."""
    for rude in (False, True) * 3:
        wire = Wire(server).send(lookup([1] * 1000, "wide"))
        wire.take(1000)
        wire.reset() if rude else wire.close()


@pytest.mark.parametrize("size", [1, 3, 12_000])
def test_a_half_closed_client_gets_its_answer(server: ServerProcess, size: int) -> None:
    """shutdown(SHUT_WR) after the request says that no more comes, not that nobody listens."""
    ids = [n % NUM for n in range(size)]
    with Wire(server) as wire:
        is_right(wire.send(lookup(ids)).half_close().answer(), ids)
        assert wire.closed()


def test_a_half_closed_client_gets_a_huge_answer(server: ServerProcess) -> None:
    """Also one that does not fit into any socket buffer."""
    with Wire(server) as wire:
        is_right(wire.send(lookup([2] * 1000, "wide")).half_close().answer(), [2] * 1000, WIDE_VD)
        assert wire.closed()


BODY = octets([1, 2])
BAD_HEADS: dict[str, bytes] = {
    "negative length": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length=-16),
    "length is no number": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="sixteen"),
    "length with a plus": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="+16"),
    "length in hexadecimal": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="0x10"),
    "length is a list": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="16, 17"),
    "length past 64 bits": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length=1 << 65),
    "length of 5,000 digits": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="1" * 5000),
    "empty length": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length=""),
    "two lengths": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Content_Length="16\r\nContent-Length: 8"),
    "length and chunks": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Transfer_Encoding="chunked"),
    "chunks and length": request(
        "POST", LOOKUP, b"0\r\n\r\n", Transfer_Encoding="chunked", Content_Type=OCTETS, Content_Length=5
    ),
    "chunk size is no number": request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked") + b"zz\r\n",
    "chunk size past 64 bits": request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked")
    + b"f" * 17
    + b"\r\n",
    "negative chunk": request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked") + b"-8\r\n",
    "unknown transfer coding": request("POST", LOOKUP, BODY, Content_Type=OCTETS, Transfer_Encoding="gzip"),
    "NUL in a header": request("POST", LOOKUP, BODY, Content_Type=OCTETS, X_Request_ID="a\0b"),
    "bare CR in a header": request("POST", LOOKUP, BODY, Content_Type=OCTETS, X_Request_ID="a\rX-Evil: 1"),
    "space before the colon": request("POST", LOOKUP, BODY, Content_Type=OCTETS).replace(b"Host:", b"Host :"),
    "header without a colon": request("POST", LOOKUP, BODY, Content_Type=OCTETS).replace(b"Host:", b"Host"),
    "unknown method": request("BREW", LOOKUP, BODY, Content_Type=OCTETS),
    "lower-case method": request("post", LOOKUP, BODY, Content_Type=OCTETS),
    "HTTP/9.9": request("POST", LOOKUP, BODY, Content_Type=OCTETS).replace(b"HTTP/1.1", b"HTTP/9.9", 1),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c403030000000000000000000000000000000000"),
    "noise": bytes(range(255, 0, -1)) * 4,
    "Redis": b"*1\r\n$4\r\nPING\r\n",
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_what_is_no_http_is_refused_and_the_connection_closed(server: ServerProcess, case: str) -> None:
    """400 once, nothing after it: what follows cannot be told apart from an attack."""
    with Wire(server) as wire:
        wire.send(BAD_HEADS[case], lookup([1]))
        answers = wire.last_words()
    assert [answer.status for answer in answers] == [400]
    assert answers[0].closes
    assert b"Traceback" not in answers[0].body
    assert not {"x-evil", "x-embedding-shape"} & set(answers[0].headers)


def test_a_length_that_is_too_small_is_believed(server: ServerProcess) -> None:
    """The first ids are answered; the rest of the body is no request, and ends the connection."""
    with Wire(server) as wire:
        wire.send(request("POST", LOOKUP, octets([5, -1, -1]), Content_Type=OCTETS, Content_Length=8))
        first, second = wire.last_words()
    is_right(first, [5])
    assert (second.status, second.closes) == (400, True)


def test_requests_before_garbage_are_answered(server: ServerProcess) -> None:
    """What came whole before the connection went wrong gets its reply, small or large."""
    ids = [n % NUM for n in range(12_000)]
    with Wire(server) as wire:
        wire.send(lookup([1]), lookup(ids), b"\0garbage\r\n\r\n")
        answers = wire.last_words()
    is_right(answers[0], [1])
    is_right(answers[1], ids)
    assert [answer.status for answer in answers[2:]] in ([], [400])


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    """Lookups small and large, probes and refusals in one segment: each its own answer, in the order sent."""
    sent, checks = [], []
    for n in range(300):
        kind = n % 6
        if kind == 0:
            sent.append(request("GET", "/readyz", X_Request_ID=f"r{n}"))
        elif kind == 1:
            sent.append(lookup([1], "nothing", X_Request_ID=f"r{n}"))
        elif kind == 2:
            sent.append(request("GET", "/v1/tables", X_Request_ID=f"r{n}"))
        elif kind == 3 and n % 60 == 3:
            sent.append(lookup([n % NUM] * 10_000, X_Request_ID=f"r{n}"))
        else:
            sent.append(lookup([n, n + 1], X_Request_ID=f"r{n}"))
        checks.append(kind)
    with Wire(server) as wire:
        sender = wire.send_aside(b"".join(sent))
        for n, kind in enumerate(checks):
            answer = wire.answer()
            assert answer.headers["x-request-id"] == f"r{n}"
            if kind == 0:
                assert json.loads(answer.body)["status"] == "ok"
            elif kind == 1:
                assert answer.code == "table_not_found"
            elif kind == 2:
                assert b'"wide"' in answer.body
            else:
                is_right(answer, [n % NUM] * 10_000 if kind == 3 and n % 60 == 3 else [n, n + 1])
        sender.join(20)


@pytest.mark.parametrize("between", ["another call", "a large lookup", "a probe", "a refusal"])
@pytest.mark.parametrize("pause", [0.0, 0.3], ids=["at once", "later"])
def test_a_pipeline_behind_an_unread_reply_keeps_its_order(server: ServerProcess, between: str, pause: float) -> None:
    """Whatever stands behind a huge reply that is not being read yet comes after it, in the order sent."""
    ids = [n % NUM for n in range(12_000)]
    middle = {
        "another call": request("GET", "/v1/tables", X_Request_ID="r1"),
        "a large lookup": lookup(ids, X_Request_ID="r1"),
        "a probe": request("GET", "/livez", X_Request_ID="r1"),
        "a refusal": lookup([1], "nothing", X_Request_ID="r1"),
    }[between]
    last = [lookup([n], X_Request_ID=f"r{n}") for n in range(2, 30)]
    with Wire(server, receive_buffer=65_536) as wire:
        wire.send(lookup([1] * 1000, "wide", X_Request_ID="r0"))
        time.sleep(pause)
        wire.send(middle, *last)
        time.sleep(0.3)
        answers = wire.answers(30)
    assert [answer.headers["x-request-id"] for answer in answers] == [f"r{n}" for n in range(30)]
    is_right(answers[0], [1] * 1000, WIDE_VD)
    for n, answer in enumerate(answers[2:], 2):
        is_right(answer, [n])


def test_single_bytes_and_every_cut_make_the_same_request(server: ServerProcess) -> None:
    """Wherever the network cuts a request, it is the same request."""
    whole = lookup([3, 4], X_Request_ID="cut")
    with Wire(server) as wire:
        for byte in whole:
            wire.send(bytes([byte]))
            time.sleep(0.0005)
        is_right(wire.answer(), [3, 4])
        for cut in range(1, len(whole), 3):
            wire.send(whole[:cut])
            time.sleep(0.002)
            is_right(wire.send(whole[cut:]).answer(), [3, 4])


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    """A lookup in chunks."""
    body = b"".join(b"%x;note=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"
    return request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked") + body


def test_chunked_bodies_are_bodies(server: ServerProcess) -> None:
    """In one chunk, in single bytes, with extensions and trailers, none at all; the connection goes on."""
    data = octets([7, 8, 9])
    with Wire(server) as wire:
        for sent in (chunked(data), chunked(*(bytes([b]) for b in data)), chunked(data, trailer=b"X-Sum: 1\r\n")):
            is_right(wire.send(sent).answer(), [7, 8, 9])
        is_right(wire.send(chunked()).answer(), [])
        assert wire.send(chunked(data[:9])).answer().code == "malformed_request"
        is_right(wire.send(lookup([1])).answer(), [1])


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_chunks_without_end_are_cut_off(server: ServerProcess, size: int) -> None:
    """More than a body may have is 413, however small its pieces, and no more than a little of it is read."""
    head = request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked")
    chunk = b"%x\r\n%s\r\n" % (size, bytes(size))
    pieces = max(1, (1 << 16) // size)
    with Wire(server) as wire:
        wire.send(head)
        rounds = 0
        while rounds < 400 and wire.try_send(chunk * pieces):
            rounds += 1
        answer = wire.answer()
        assert (answer.code, answer.status) == ("body_too_large", 413)
    assert json.loads(answer.body)["limit"] == MAX_BODY


def test_a_chunk_that_claims_a_terabyte_is_cut_off(server: ServerProcess) -> None:
    """The claim costs nothing; the bytes are counted as they come."""
    with Wire(server) as wire:
        wire.send(request("POST", LOOKUP, Content_Type=OCTETS, Transfer_Encoding="chunked"), b"fffffffffff\r\n")
        wire.try_send(bytes(3 * MAX_BODY))
        assert wire.answer().code == "body_too_large"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "GZIP"])
def test_compressed_bodies_are_refused_unopened(server: ServerProcess, coding: str) -> None:
    """A bomb of 64 MiB in 64 KiB stays closed."""
    bomb = zlib.compress(bytes(64 << 20), 9) if coding == "deflate" else gzip.compress(bytes(64 << 20), 9)
    assert len(bomb) < MAX_BODY
    with Wire(server) as wire:
        wire.send(request("POST", LOOKUP, bomb, Content_Type=OCTETS, Content_Encoding=coding))
        answer = wire.answer()
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


HEAD_BOMBS = {
    "one header of 100 kB": b"X-Big: " + b"a" * 100_000 + b"\r\n",
    "one name of 100 kB": b"X" * 100_000 + b": 1\r\n",
    "10,000 headers": b"".join(b"X-%d: 1\r\n" % n for n in range(10_000)),
    "10,000 times one header": b"X-Same: 1\r\n" * 10_000,
    "one header of 20 MB": b"X-Big: " + b"a" * 20_000_000 + b"\r\n",
    "folded lines": b"X-Fold: a\r\n" + b" b\r\n" * 50_000,
}


@pytest.mark.parametrize("case", HEAD_BOMBS)
@pytest.mark.parametrize("path", [LOOKUP, "/v1/tables"])
def test_header_bombs_are_refused(server: ServerProcess, case: str, path: str) -> None:
    """More than a head may have is 431 (or 400) and the end of the connection, on every path, before it is all read."""
    with Wire(server) as wire:
        wire.try_send(b"POST %s HTTP/1.1\r\nHost: x\r\n" % path.encode() + HEAD_BOMBS[case] + b"\r\n")
        assert refused_head(wire) in (400, 431)


@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_absurdly_long_urls_are_refused(server: ServerProcess, size: int) -> None:
    """A request line of that size is nobody's table."""
    with Wire(server) as wire:
        wire.try_send(b"GET /v1/tables/" + b"a" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert refused_head(wire) in (400, 414, 431)


def refused_head(wire: Wire) -> int:
    """Status of the refusal, after which the server has hung up."""
    answer: Answer
    answer, *more = wire.last_words()
    assert more == []
    assert answer.closes
    return answer.status
