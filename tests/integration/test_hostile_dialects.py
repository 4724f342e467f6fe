"""Old, odd and sly HTTP: what the standard allows is answered, what would confuse a proxy is not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support.hostile import Wire, guarded, is_right, lookup, octets, request, unharmed
from support.serving import ServerProcess

LOOKUP = "/v1/tables/item/lookup"
OCTETS = "application/octet-stream"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with every default."""
    folder = tmp_path_factory.mktemp("dialects")
    with guarded(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _unharmed(server: ServerProcess) -> Iterator[None]:
    """After each test the server answers rightly and has let go of what the test opened."""
    with unharmed(server):
        yield


def old(sent: bytes) -> bytes:
    """The same request in HTTP/1.0."""
    return sent.replace(b"HTTP/1.1", b"HTTP/1.0", 1)


@pytest.mark.parametrize("path", [LOOKUP, "/livez", "/v1/tables"])
def test_http_1_0_is_answered_and_closed(server: ServerProcess, path: str) -> None:
    """One request, one reply with its length, and the end."""
    sent = lookup([4]) if path == LOOKUP else request("GET", path)
    with Wire(server) as wire:
        (answer,) = wire.send(old(sent)).last_words()
    assert answer.status == 200
    if path == LOOKUP:
        is_right(answer, [4])


def test_http_1_0_keep_alive_is_kept_or_closed_but_never_both(server: ServerProcess) -> None:
    """Either the reply says keep-alive and the next request is answered, or the connection ends."""
    with Wire(server) as wire:
        first = wire.send(old(lookup([4], Connection="keep-alive"))).answer()
        is_right(first, [4])
        if first.headers.get("connection", "").lower() == "keep-alive":
            is_right(wire.send(old(lookup([5]))).answer(), [5])
        else:
            assert wire.closed()


def test_connection_close_is_honoured(server: ServerProcess) -> None:
    """The reply says close too, nothing pipelined after it is answered, and the connection ends."""
    for sent in (lookup([4], Connection="close"), request("GET", "/v1/tables", Connection="Close")):
        with Wire(server) as wire:
            (answer,) = wire.send(sent, lookup([5])).last_words()
        assert (answer.status, answer.closes) == (200, True)


def test_expect_continue_is_asked_for_the_body(server: ServerProcess) -> None:
    """100 before the body is sent, the vectors after it, and only one 100."""
    sent = lookup([1, 2], Expect="100-continue")
    cut = sent.index(b"\r\n\r\n") + 4
    with Wire(server) as wire:
        assert wire.send(sent[:cut]).answer().status == 100
        is_right(wire.send(sent[cut:]).answer(), [1, 2])
        is_right(wire.send(lookup([3])).answer(), [3])


def test_expect_continue_for_too_much_is_refused_at_once(server: ServerProcess) -> None:
    """A body that is too large, or of the wrong coding, is not asked for."""
    too_large = request("POST", LOOKUP, Content_Type=OCTETS, Content_Length=1 << 40, Expect="100-continue")
    encoded = request(
        "POST", LOOKUP, Content_Type=OCTETS, Content_Length=80, Content_Encoding="br", Expect="100-continue"
    )
    for sent, code in ((too_large, "body_too_large"), (encoded, "unsupported_media_type")):
        with Wire(server) as wire:
            assert wire.send(sent).answer().code == code


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_are_405_and_framed(server: ServerProcess, method: str) -> None:
    """With or without a body, a lookup by another method is 405 with Allow, and the next request is read right."""
    with Wire(server) as wire:
        for body in (None, octets([1, 2])):
            wire.send(request(method, LOOKUP, body, Content_Type=OCTETS), lookup([9]))
            answer = wire.answer()
            assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", "POST")
            is_right(wire.answer(), [9])


@pytest.mark.parametrize("path", [LOOKUP, "/livez", "/readyz", "/v1/tables", "/nothing", "/metrics"])
def test_head_has_no_body(server: ServerProcess, path: str) -> None:
    """Whatever HEAD is answered with, no byte of a body follows to be taken for the next reply."""
    with Wire(server) as wire:
        answer = wire.send(request("HEAD", path), lookup([9])).answer(head=True)
        assert answer.status in (200, 404, 405)
        is_right(wire.answer(), [9])


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
def test_probes_take_get_only(server: ServerProcess, path: str, method: str) -> None:
    """A probe by another method is 405, in the usual shape."""
    with Wire(server) as wire:
        answer = wire.send(request(method, path, b"{}"), lookup([9])).answer()
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        is_right(wire.answer(), [9])


def test_a_body_on_a_call_without_one_is_not_the_next_request(server: ServerProcess) -> None:
    """A request hidden in the body of a GET is never answered."""
    hidden = lookup([1], X_Request_ID="hidden")
    for path in ("/livez", "/v1/tables", "/nothing"):
        with Wire(server) as wire:
            wire.send(request("GET", path, hidden, X_Request_ID="shown"), lookup([2], X_Request_ID="next"))
            assert [answer.headers["x-request-id"] for answer in wire.answers(2)] == ["shown", "next"]


def test_absolute_form_is_understood(server: ServerProcess) -> None:
    """What a client sends to a proxy means the same here."""
    with Wire(server) as wire:
        sent = lookup([6]).replace(LOOKUP.encode(), f"http://somewhere:80{LOOKUP}".encode(), 1)
        is_right(wire.send(sent).answer(), [6])
        assert wire.send(request("GET", "http://somewhere/livez")).answer().status == 200


@pytest.mark.parametrize(
    "target", ["*", "//", "///v1/tables", "/v1//lookup", "somewhere:443", "/%", "/%ff", "/v1/tables/%00", "?"]
)
def test_odd_targets_are_not_found_or_malformed(server: ServerProcess, target: str) -> None:
    """No request target makes a failure."""
    for method in ("GET", "POST", "OPTIONS"):
        with Wire(server) as wire:
            assert wire.send(request(method, target, b"")).answer().status in (400, 404, 405)


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "item%00", "%0d%0aX-Evil:%201", "%ff%fe", "a" * 4000]
)
def test_table_names_are_names(server: ServerProcess, name: str) -> None:
    """A path in a table's name finds no table, and nothing of it becomes a header."""
    with Wire(server) as wire:
        answer = wire.send(lookup([1], name)).answer()
        assert answer.code in ("table_not_found", "not_found")
        assert "x-evil" not in answer.headers
        assert len(answer.body) < 10_000
        is_right(wire.send(lookup([1])).answer(), [1])


@pytest.mark.parametrize(
    "headers",
    [
        {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": 13, "Sec_WebSocket_Key": "YQ=="},
        {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAAQ"},
        {"Connection": "upgrade", "Upgrade": "TLS/1.0"},
    ],
    ids=["websocket", "h2c", "tls"],
)
@pytest.mark.parametrize("path", [LOOKUP, "/v1/tables", "/livez"])
def test_upgrades_are_declined(server: ServerProcess, path: str, headers: dict[str, str]) -> None:
    """The request is answered in HTTP/1.1 as if nothing had been offered, or refused; there is never a 101."""
    sent = lookup([1], **headers) if path == LOOKUP else request("GET", path, None, **headers)
    with Wire(server) as wire:
        answer = wire.send(sent).answer()
    assert answer.status in (200, 400, 426)
    if answer.status == 200 and path == LOOKUP:
        is_right(answer, [1])


def test_connect_makes_no_tunnel(server: ServerProcess) -> None:
    """CONNECT is refused."""
    with Wire(server) as wire:
        assert wire.send(request("CONNECT", "somewhere:443")).answer().status in (400, 404, 405)


SLY_IDS = {
    "too long": "a" * 129,
    "spaces": "a b",
    "tab": "a\tb",
    "latin-1": "caf\xe9",
    "delete": "a\x7fb",
    "empty": "",
}


@pytest.mark.parametrize("case", SLY_IDS)
@pytest.mark.parametrize("path", [LOOKUP, "/livez", "/v1/tables", "/nothing"])
def test_request_ids_that_could_do_harm_are_replaced(server: ServerProcess, path: str, case: str) -> None:
    """Only printable ASCII without spaces is echoed; anything else is answered under an id made here, or refused."""
    given = SLY_IDS[case]
    sent = lookup([1], X_Request_ID=given) if path == LOOKUP else request("GET", path, X_Request_ID=given)
    with Wire(server) as wire:
        answer = wire.send(sent).answer()
    assert answer.status in (200, 400, 404)
    made = answer.headers.get("x-request-id", "made-1")
    assert made != given
    assert made.isascii()
    assert made.isprintable()


@pytest.mark.parametrize("path", [LOOKUP, "/livez", "/v1/tables"])
def test_line_ends_in_a_request_id_split_nothing(server: ServerProcess, path: str) -> None:
    """Escaped line ends are echoed as they are written; real ones begin a header of the request, not of the reply."""
    for given in ("a%0d%0aX-Evil:1", "a\r\nX-Evil: 1", "a\\r\\nX-Evil:1"):
        sent = lookup([1], X_Request_ID=given) if path == LOOKUP else request("GET", path, X_Request_ID=given)
        with Wire(server) as wire:
            answer = wire.send(sent).answer()
        assert "x-evil" not in answer.headers
        assert answer.headers["x-request-id"] == given.partition("\r\n")[0]


def test_problem_details_quote_what_was_sent_as_json(server: ServerProcess) -> None:
    """Quotes, markup and control characters of a request come back inside a JSON string, cut short."""
    sly = '"}</script><script>\x01' + "x" * 5000
    with Wire(server) as wire:
        body = json.dumps({"ids": [1], "on_missing": sly}).encode()
        answer = wire.send(request("POST", LOOKUP, body, Content_Type="application/json")).answer()
    assert answer.code == "unprocessable"
    assert len(answer.body) < 1000
    assert answer.headers["content-type"] == "application/problem+json"
