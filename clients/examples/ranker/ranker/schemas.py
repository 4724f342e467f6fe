"""What a request holds and what an answer says."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from ranker.artifact import Key, Side

MIN_ID, MAX_ID = -(2**63), 2**63 - 1
MAX_KEY = 1024
_DIGITS = re.compile(r"-?[0-9]{1,19}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Unprocessable(Exception):
    """A value in a request is not allowed; the message names the place."""


def _check_id(value: Any) -> Key:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"an id is a whole number or a string, got {value!r:.40}")
    if isinstance(value, str) and (len(value) > MAX_KEY or _SURROGATE.search(value)):
        raise ValueError(f"an id has at most {MAX_KEY:,} characters, all of them Unicode's, got {value!r:.40}")
    return value


Id = Annotated[
    int | str,
    PlainValidator(_check_id),
    WithJsonSchema({"anyOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]}),
]


class RankRequest(BaseModel):
    """Who to rank for, what to rank, how many to return. Whole numbers may come as strings of digits."""

    model_config = ConfigDict(extra="forbid")

    user: Id
    candidates: list[Id] = Field(description="Ids of items; one that occurs twice is ranked once.")
    top: int = Field(default=20, ge=1, strict=True)


class Ranked(BaseModel):
    """One item of the answer; `id` as the request had it."""

    id: int | str
    score: float


class RankResponse(BaseModel):
    """The best candidates, best first, and what they were found by.

    degraded: the embedding service could not be asked, `reason` says why; items then come in the request's order.
    """

    release: str
    items: list[Ranked]
    degraded: bool
    reason: str | None
    unknown_user: bool
    num_unknown_items: int


def key_of(value: Key, side: Side, place: str) -> Key:
    """An id as its table has it; Unprocessable where the table can have no such id."""
    if side.keys == "string":
        if isinstance(value, str):
            return value
        raise Unprocessable(f"{place}: ids of {side.table}s are strings, got the number {value}")
    if isinstance(value, str):
        if not _DIGITS.fullmatch(value):
            raise Unprocessable(f"{place}: ids of {side.table}s are whole numbers, got {value!r:.40}")
        value = int(value)
    if not MIN_ID <= value <= MAX_ID:
        raise Unprocessable(f"{place}: ids of {side.table}s fit 64 bits, got {value}")
    return value
