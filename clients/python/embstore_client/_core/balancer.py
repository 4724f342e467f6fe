"""Which address a request goes to: the less busy of two at random, among those that answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

EJECT_AFTER = 3
"""Failures in a row after which an address is left alone."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
MEMORY_S = 10.0
"""Half of what is known of an address's latency is forgotten in this time, so that a slow one is tried again."""
MUCH_WORSE = 1.5
"""Costs that differ by less are the same: small differences must not send everybody to one address."""
_NEWEST = 0.2


class Address:
    """One server, and what this client knows about it."""

    __slots__ = (
        "_latency_s",
        "_measured_at",
        "disliked_at",
        "disliked_until",
        "ejected_until",
        "failures",
        "in_flight",
        "pauses",
        "probing",
        "url",
    )

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.failures = 0
        self.pauses = 0
        self.ejected_until: float | None = None
        self.probing = False
        self.disliked_at = self.disliked_until = 0.0
        self._latency_s: float | None = None
        self._measured_at = 0.0

    def measured(self, now: float, seconds: float) -> None:
        """An answer took `seconds`."""
        before = self._latency_s
        self._latency_s = seconds if before is None else before + _NEWEST * (seconds - before)
        self._measured_at = now

    def latency_s(self, now: float) -> float | None:
        """What an answer may take now."""
        if self._latency_s is None:
            return None
        return self._latency_s * float(0.5 ** ((now - self._measured_at) / MEMORY_S))

    def wants_probe(self, now: float) -> bool:
        """The pause is over and nobody has tried yet."""
        return self.ejected_until is not None and now >= self.ejected_until and not self.probing


class Balancer:
    """The addresses of one client."""

    def __init__(self, urls: Sequence[str], random: Random) -> None:
        self.addresses = [Address(url) for url in urls]
        self._random = random

    def choose(self, now: float, avoid: Collection[Address] = ()) -> Address:
        """The address for the next attempt; one of `avoid`, or one that is ejected, only where there is no better."""
        if len(self.addresses) == 1:
            return self.addresses[0]
        for address in self.addresses:
            if address not in avoid and address.wants_probe(now):
                return address

        def reluctance(address: Address) -> tuple[bool, bool, bool]:
            return address.ejected_until is not None, now < address.disliked_until, address in avoid

        least = min(map(reluctance, self.addresses))
        equal = [address for address in self.addresses if reluctance(address) == least]
        if least[1]:
            return min(equal, key=lambda address: address.disliked_until)
        return equal[0] if len(equal) == 1 else self._less_busy(now, *self._random.sample(equal, 2))

    def started(self, address: Address, now: float) -> bool:
        """An attempt goes out to `address`; True where it is the one that probes it."""
        probe = address.wants_probe(now)
        address.in_flight += 1
        address.probing = address.probing or probe
        return probe

    def ended(self, address: Address, *, probe: bool = False) -> None:
        """An attempt is over, however that came about; nothing is learned about `address`."""
        address.in_flight -= 1
        if probe:
            address.probing = False

    def answered(self, address: Address, now: float, seconds: float | None) -> bool:
        """An answer came from `address`; True where that ends an ejection. `seconds` only where it tells its speed."""
        restored = address.ejected_until is not None
        address.failures = address.pauses = 0
        address.ejected_until = None
        if seconds is not None:
            if now - seconds >= address.disliked_at:
                address.disliked_until = 0.0
            address.measured(now, seconds)
        return restored

    def failed(self, address: Address, now: float, began: float) -> float | None:
        """No answer came, or a 503; the seconds that the address is left alone for, where it is from now on."""
        if address.ejected_until is not None and began < address.ejected_until:
            return None  # older news than those that it was ejected for
        address.failures += 1
        if len(self.addresses) == 1 or address.failures < EJECT_AFTER:
            return None
        pause = min(FIRST_PAUSE_S * 2.0**address.pauses, LONGEST_PAUSE_S) * self._random.uniform(0.75, 1.25)
        address.pauses += 1
        address.ejected_until = now + pause
        return pause

    def overtaken(self, address: Address, now: float, seconds: float) -> None:
        """An attempt was given up after `seconds`: its answer would have taken longer."""
        if seconds > self._expected_s(address, now):
            address.measured(now, seconds)

    def asked_to_wait(self, address: Address, now: float, seconds: float) -> None:
        """`address` said `Retry-After`: others are liked better until then, or until it answers what is asked after."""
        address.disliked_at = now
        address.disliked_until = max(address.disliked_until, now + min(seconds, LONGEST_PAUSE_S))

    def _less_busy(self, now: float, one: Address, other: Address) -> Address:
        cost, other_cost = self._cost(one, now), self._cost(other, now)
        return other if cost > MUCH_WORSE * other_cost else one

    def _cost(self, address: Address, now: float) -> float:
        return (address.in_flight + 1) * self._expected_s(address, now)

    def _expected_s(self, address: Address, now: float) -> float:
        """What an answer may take; an address that is not known yet counts as the average one."""
        latency = address.latency_s(now)
        if latency is not None:
            return latency
        known = [a.latency_s(now) or 0.0 for a in self.addresses if a.latency_s(now) is not None]
        return sum(known) / len(known) if known else 1.0
