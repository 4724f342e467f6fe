"""What both clients know and do without IO: settings, `Request` to httpx, faults of the network to our errors."""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import httpcore
import httpx

from embstore_client._core import protocol
from embstore_client._core.addresses import check_base_urls, url_and_socket
from embstore_client._core.attempts import Attempt, Attempts, EachAddress, Traffic, late, reason_of
from embstore_client._core.connections import NO_ROOM
from embstore_client._core.deadline import Deadline, GivenUp
from embstore_client._core.near_cache import NearCache
from embstore_client._core.observer import Observer
from embstore_client._core.options import check_on_missing
from embstore_client._core.plan import Plan, the_only_answer
from embstore_client._core.planner import Planner
from embstore_client._core.policies import Hedge, Retries
from embstore_client._core.protocol import Reply, Request
from embstore_client._errors import ConnectionFailed, NotReady, ProtocolError, Timeout
from embstore_client._version import __version__

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 1.0
LONGEST_TIMEOUT_S = 86_400.0

FAULTS = (
    httpx.TransportError,  # timeouts are among them
    httpx.DecodingError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
)
"""What a transport raises."""


class ClientCore:
    """One client without its network."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        timeout_s: float,
        api_key: str | None,
        on_missing: str,
        retries: Retries | None,
        hedge: Hedge | None,
        near_cache: NearCache | int | None,
        max_ids: int,
        observer: Observer | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_on_missing(on_missing)
        self.base_urls = check_base_urls(base_url)
        self.timeout_s = check_timeout(timeout_s)
        self.clock = clock
        self.traffic = Traffic(self.base_urls, retries, hedge, observer, lambda: self.clock())
        cache = NearCache(near_cache) if isinstance(near_cache, int) else near_cache
        self.planner = Planner(on_missing=on_missing, max_ids=max_ids, near_cache=cache, clock=self.traffic.clock)
        headers = {
            "user-agent": f"embstore-client/{__version__}",
            "accept-encoding": "identity",  # floats do not compress, and decompressing is a copy
        }
        if api_key is not None:
            headers["authorization"] = f"Bearer {_check_api_key(api_key)}"
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    @contextmanager
    def call(self, operation: str, timeout_s: float | None) -> Iterator[Deadline]:
        """One call from now to its deadline; the observer hears how it ended."""
        deadline = Deadline(self.timeout_s if timeout_s is None else check_timeout(timeout_s), self.traffic.clock)
        failure: BaseException | None = None
        try:
            yield deadline
        except GivenUp as given_up:
            failure = given_up.error
            raise given_up.error from given_up.__cause__
        except BaseException as error:
            failure = error
            raise
        finally:
            if self.traffic.observer is not None:
                seconds = deadline.timeout_s - deadline.left()
                self.traffic.tell("call_ended", operation=operation, seconds=seconds, reason=reason_of(failure))

    def claim_cache(self) -> None:
        """The last step of making a client, for what fails before must leave the near-cache to the next one."""
        if self.planner.near_cache is not None:
            self.planner.near_cache.claim()

    def plan(self, make: Callable[[], Plan[T]]) -> Plan[T]:
        """What `make` plans; the observer hears what the near-cache knew of it."""
        plan = make()
        if plan.hits or plan.misses:
            self.traffic.tell("near_cache", hits=plan.hits, misses=plan.misses)
        return plan

    def attempts(self, deadline: Deadline) -> Attempts:
        """The attempts of one request."""
        return Attempts(self.traffic, deadline, self.traffic.retries)

    def attempts_at_each_address(self, deadline: Deadline) -> Attempts:
        """One attempt at each address until one answers."""
        return EachAddress(self.traffic, deadline)

    def http_request(self, request: Request[T], attempt: Attempt) -> httpx.Request:
        """One attempt as httpx sends it."""
        url, uds = url_and_socket(attempt.address.url, request.target)
        timeout_ms = math.ceil(attempt.timeouts.timeout_s * 1000)
        headers = [
            (b"host", url.netloc),
            *self._headers,
            *_encoded(request.headers),
            (b"x-request-timeout-ms", b"%d" % max(timeout_ms, 1)),
        ]
        if request.body or request.method == "POST":
            headers.append((b"content-length", b"%d" % len(request.body)))
        observer = self.traffic.observer
        if observer is not None:
            headers += observer.headers()
        return httpx.Request(
            request.method,
            url,
            headers=headers,
            stream=httpx.ByteStream(request.body),
            extensions={"timeout": attempt.timeouts, "uds": uds},
        )

    def parse(self, request: Request[T], response: httpx.Response, chunks: list[bytes]) -> T:
        """What a whole answer means."""
        headers = protocol.fold_headers(response.headers.raw)
        return request.parse(Reply(response.status_code, headers, b"".join(chunks)))

    def error_of(self, fault: Exception, attempt: Attempt, deadline: Deadline, *, closed: bool) -> Exception:
        """A fault of the network as the error that the caller sees, `GivenUp` where no other attempt may follow."""
        url, why = attempt.address.url, str(fault) or type(fault).__name__
        if closed:
            return given_up_by_close()
        if isinstance(fault, httpx.LocalProtocolError | httpcore.LocalProtocolError):
            return GivenUp(ProtocolError(f"the request cannot be sent as HTTP: {fault}"))
        if isinstance(fault, httpx.TimeoutException | httpcore.TimeoutException | TimeoutError):
            if isinstance(fault, httpx.ConnectTimeout | httpcore.ConnectTimeout) and deadline.left() > 0:
                return Timeout(f"no connection to {url} in time: {why}", timeout_s=deadline.timeout_s)
            if attempt.timeouts.queues:
                return Timeout(f"{NO_ROOM}, for {deadline.timeout_s:g} s", timeout_s=deadline.timeout_s)
            return late(attempt.address, deadline)
        if isinstance(fault, httpx.DecodingError):
            return ProtocolError(f"the answer from {url} cannot be decoded: {why}")
        return ConnectionFailed(f"no whole answer from {url}: {why}")

    def describe(self, name: str) -> str:
        """The client's repr; a key is not in it."""
        urls = self.base_urls[0] if len(self.base_urls) == 1 else list(self.base_urls)
        return f"{name}({urls!r}, timeout_s={self.timeout_s:g})"


def given_up_by_close() -> GivenUp:
    """What ends an attempt when its client is closed; where it was only part of a call that failed, nobody hears."""
    return GivenUp(ConnectionFailed("the client was closed during the call"))


def only(request: Request[T]) -> Plan[T]:
    """The plan of a call that is one request."""
    return Plan((request,), the_only_answer)


def plan_ready() -> Plan[bool]:
    """The plan that asks whether somebody is ready; not to be is an error here, so that the next address is asked."""
    request = protocol.build_ready()

    def parse(reply: Reply) -> bool:
        if reply.status in (429, 504) or not request.parse(reply):
            raise NotReady(f"not ready ({reply.status})", status=reply.status)
        return True

    return only(replace(request, parse=parse))


@lru_cache(maxsize=64)
def _encoded(headers: tuple[tuple[str, str], ...]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.encode("ascii"), value.encode("ascii")) for name, value in headers)


def ssl_context_for(base_urls: Sequence[str], verify: bool | str | ssl.SSLContext) -> ssl.SSLContext | None:
    """How certificates are checked; None where no address needs it, for reading all roots takes a while."""
    if isinstance(verify, ssl.SSLContext):
        return verify
    if not any(url.startswith("https://") for url in base_urls):
        return None
    if isinstance(verify, str):
        return ssl.create_default_context(cafile=verify)
    return httpx.create_ssl_context(verify=verify)


def check_timeout(timeout_s: float) -> float:
    """Seconds, above 0 and finite."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout_s must be seconds, a number above 0, got {timeout_s!r}")
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise ValueError(f"timeout_s must be above 0 and at most {LONGEST_TIMEOUT_S:g} s, got {timeout_s}")
    return float(timeout_s)


def _check_api_key(api_key: str) -> str:
    """The key, if it can stand in a header; the message must not repeat it."""
    if not api_key or not all("!" <= char <= "~" for char in api_key):
        raise ValueError("api_key must be printable ASCII without spaces, and not empty")
    return api_key
