"""uvicorn's HTTP/1.1 with one more way to answer: a whole reply, head and body, in one call.

ASGI sends a reply as a list of headers and then a body; uvicorn searches each name and value for forbidden characters
and joins them. For ten vectors that is a third of the time of the request. `REPLY` in `scope["extensions"]` takes the
head as bytes that are known to be right. Where it is absent (another server, a test), ASGI's way is used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

REPLY = "embstore.reply"


class LookupProtocol(HttpToolsProtocol):
    """uvicorn's protocol; every request's scope offers REPLY."""

    def on_headers_complete(self) -> None:
        """The request's task exists now and has not run yet."""
        super().on_headers_complete()
        extensions: dict[str, Any] = {REPLY: partial(send_reply, self.cycle)}
        self.scope["extensions"] = extensions


async def send_reply(cycle: RequestResponseCycle, head: bytes, rows: Any, bits: bytes, *, close: bool) -> None:
    """Send a complete reply: `head` is the status line and header lines, `rows` and `bits` are the body.

    The server adds its own headers (the date); `close` ends the connection after the reply, as the client's wish does.
    """
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if cycle.disconnected:
        return
    cycle.response_started, cycle.waiting_for_100_continue = True, False
    if close:
        cycle.keep_alive = False
    lines = [head]
    for name, value in cycle.default_headers:
        lines += (name, b": ", value, b"\r\n")
    lines.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    write = cycle.transport.write
    write(b"".join(lines))
    if rows:
        write(rows)
    if bits:
        write(bits)
    cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
