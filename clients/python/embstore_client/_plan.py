"""One call of the user: the requests that it takes, and what their answers make. No IO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ._protocol import Request

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan(Generic[T]):
    """Requests that may travel at the same time, and what their answers make.

    Attributes:
        requests: to be sent, each answer given to its own `parse`; none where the near-cache knows everything.
        merge: takes what `parse` returned, in the order of `requests`. It returns the result; or a further plan to
            carry out, where a version changed between the answers. A further plan is pinned to one version.
    """

    requests: Sequence[Request[Any]]
    merge: Callable[[Sequence[Any]], T | Plan[T]]
