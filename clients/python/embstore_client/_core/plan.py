"""One call of the user: the requests that it takes, and what their answers make. No IO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, TypeVar

from embstore_client._core.protocol import Request
from embstore_client._errors import TooLarge

T = TypeVar("T")

the_only_answer = itemgetter(0)
"""What merges the answers of a plan of one request."""


def _unsplittable(error: TooLarge) -> Any:
    """For what cannot be split."""
    raise error


@dataclass(frozen=True, slots=True)
class Plan(Generic[T]):
    """Requests that may travel at the same time, and what their answers make.

    Attributes:
        requests: to be sent, each answer given to its own `parse`; none where the near-cache knows everything.
        merge: takes what `parse` returned, in the order of `requests`. It returns the result; or a further plan to
            carry out, where a version changed between the answers. A further plan is pinned to one version.
        smaller: takes the server's refusal of a request as too large, and returns the call again in smaller chunks;
            raises the refusal where that would not help.
        hits, misses: ids that the near-cache knew when it was asked, and those that it did not.
    """

    requests: Sequence[Request[Any]]
    merge: Callable[[Sequence[Any]], T | Plan[T]]
    smaller: Callable[[TooLarge], Plan[T]] = _unsplittable
    hits: int = 0
    misses: int = 0
