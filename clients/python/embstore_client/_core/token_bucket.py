"""How much extra work a client may cause: a token bucket that its own requests fill."""

from __future__ import annotations


class TokenBucket:
    """Extra attempts allowed: `share` of the requests made, and `per_s` a second besides.

    Each request puts `share` of a token in, each extra attempt takes one out, so when everything fails the extra load
    stays at `share` of the load. `burst` is what may be saved up, `initial` what there is before any request.
    """

    def __init__(self, share: float, *, per_s: float, burst: float, initial: float) -> None:
        self._share, self._per_s, self._burst = share, per_s, burst
        self._tokens = initial
        self._last: float | None = None

    def deposit(self) -> None:
        """A request was made."""
        self._tokens = min(self._tokens + self._share, self._burst)

    def take(self, now: float) -> bool:
        """Whether one extra attempt may be made; it is then paid for."""
        if self._last is not None:
            self._tokens = min(self._tokens + self._per_s * max(now - self._last, 0.0), self._burst)
        self._last = now
        if self._tokens < 1.0 - 1e-9:  # ten times a tenth is a little less than one
            return False
        self._tokens -= 1.0
        return True
