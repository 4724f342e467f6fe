"""The body of a request while it arrives: never more of it in memory than is allowed."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping

from embstore.errors import BadRequest, BodyTooLarge, EmbstoreError, Overloaded, UnsupportedMediaType
from server.http.admission import Admission

FREE_BODY_BYTES = 64 << 10
"""Bodies up to this size need no reservation: what one read brings is in memory already."""


class Body:
    """Collects a body. `error` says why the request is refused, as soon as that is known."""

    def __init__(self, headers: Mapping[bytes, bytes], limit: int, admission: Admission) -> None:
        self._headers, self._limit, self._admission = headers, limit, admission
        self._parts: list[bytes] = []
        self.num_bytes = self._reserved = 0
        self.error: EmbstoreError | None = check_head(headers, limit)
        if self.error is None and (claimed := content_length(headers)) > FREE_BODY_BYTES:
            self._reserve(claimed)

    def add(self, part: bytes) -> None:
        """Take a part; dropped where the request is refused anyway."""
        if self.error is not None:
            return
        self._parts.append(part)
        self.num_bytes += len(part)
        if self.num_bytes > self._limit:
            self.error = too_large("more than", self._limit)
        elif self.num_bytes > max(FREE_BODY_BYTES, self._reserved):  # chunked: its length was not announced
            self._reserve(self.num_bytes)

    def whole(self) -> bytes:
        """The complete body; BadRequest when it is not as long as its Content-Length."""
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if b"content-length" in self._headers and content_length(self._headers) != len(body):
            raise BadRequest(
                f"{len(body):,} bytes of the body arrived, Content-Length is {content_length(self._headers):,}; "
                "the body of a request with an Upgrade header is not read"
            )
        return body

    def release(self) -> None:
        """Give the reservation back: the body is counted elsewhere now, or gone."""
        self._admission.arriving_bytes -= self._reserved
        self._reserved = 0

    def drop(self) -> None:
        """Forget what has arrived."""
        self.release()
        self._parts = []

    def _reserve(self, size: int) -> None:
        more = size - self._reserved
        if self._admission.has_room(more):
            self._admission.arriving_bytes += more
            self._reserved = size
        else:
            self.error = Overloaded("request memory limit reached (max_waiting_bytes); retry later", retry_after=1)


async def read_body(parts: AsyncIterable[bytes], limit: int) -> bytes:
    """The body of a call that FastAPI answers, complete; BodyTooLarge when it has more bytes than `limit`."""
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > limit:
            raise too_large("more than", limit)
    return bytes(body)


def content_length(headers: Mapping[bytes, bytes]) -> int:
    """The length that a request announces, 0 where it announces none."""
    claimed = headers.get(b"content-length", b"")
    return int(claimed) if claimed.isdigit() else 0


def check_head(headers: Mapping[bytes, bytes], limit: int) -> EmbstoreError | None:
    """Why a request is refused before its body is read, if it is."""
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return UnsupportedMediaType("the body has a Content-Encoding; send it as it is")
    size = content_length(headers)
    return too_large(f"{size:,} bytes, more than", limit) if size > limit else None


def too_large(how: str, limit: int) -> BodyTooLarge:
    """What to raise for a body over the limit."""
    return BodyTooLarge(f"the body has {how} {limit:,} bytes, which is the limit", limit=limit)
