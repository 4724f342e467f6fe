"""Plain lookups whose head was seen before: what of the reply is known already.

The general way decodes, resolves, checks limits and writes the head for each request; for rows of float32, all found,
every one of these gives the same as for the request before, until another snapshot is served.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import numpy as np

from embstore.errors import EmbstoreError
from embstore.table import Fetched, Floats, Table
from server.api.codecs import octet_stream
from server.api.codecs.vectors import OCTET_STREAM, vectors_head
from server.api.query import Answer, check_limits, resolve
from server.http.limits import Limits
from server.http.messages import COPIED_BYTES, Request
from server.http.plans import Plan
from server.http.routing import LOOKUP
from server.lookup.service import LookupService
from server.tables.snapshot import Snapshot

_SCRATCH = np.empty(COPIED_BYTES // 4 - 256, np.float32)
"""With its head such a reply is no more than what is copied."""


def is_plain(plan: Plan) -> bool:
    """Whether a head asks for one table by octet stream, without a Server-Timing header."""
    headers = plan.headers
    return (
        plan.route.kind == LOOKUP
        and headers.get(b"content-type") == OCTET_STREAM.encode()
        and b"x-timing" not in headers
        and plan.content_length % 8 == 0
        and plan.content_length > 0
    )


class PlannedRows:
    """The reply to requests with one head, as long as one snapshot is served. It keeps no snapshot or table alive."""

    __slots__ = ("_plan", "data", "embedding_dim", "head", "is_direct", "num_ids", "out_BD", "snapshot", "table")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.snapshot: Callable[[], Snapshot | None] = _nothing
        """What it was prepared for, while that is served."""
        self.table: Callable[[], Table | None] = _nothing
        self.num_ids = plan.content_length // 8
        self.embedding_dim = 0
        self.head = b""
        """Header lines of a reply in which nothing is missing."""
        self.is_direct: Callable[[], bool] = bool
        """Whether the next lookup is the table's own, here and now, and nobody wants it timed."""
        self.out_BD: Floats | None = None
        """Where small replies are written: one memory for all, since they are copied when they are sent, at once."""
        self.data: memoryview | None = None
        """Its bytes."""

    def prepare(self, snapshot: Snapshot, service: LookupService, limits: Limits) -> bool:
        """Check the head against a snapshot; False where requests with it have to go the general way."""
        plan = self._plan
        self.snapshot, self.table = ref(snapshot), _nothing  # a refusal is remembered too
        body = bytes(plan.content_length)
        call = octet_stream.decode(Request(b"POST", plan.route, plan.headers, body, b"", 0.0), limits)
        (query,) = call.queries
        try:
            release, tables = resolve(call, snapshot)
            table = tables[query.table]
            query.ids_for(table)
            check_limits(call.queries, tables, limits)
        except EmbstoreError:
            return False
        direct = service.direct_check(table, self.num_ids)
        if query.dtype != "float32" or direct is None:
            return False
        shape = np.empty((self.num_ids, table.embedding_dim), np.float32)
        self.head = vectors_head(OCTET_STREAM, Answer(query, table, Fetched(shape, None, 0)), release)
        self.out_BD = self.data = None
        if shape.size <= len(_SCRATCH):
            self.out_BD = _SCRATCH[: shape.size].reshape(shape.shape)
            self.data = self.out_BD.data.cast("B")
        self.is_direct, self.embedding_dim = direct, table.embedding_dim
        self.table = ref(table)
        return True


def _nothing() -> None:
    """What a reference to nothing gives."""
