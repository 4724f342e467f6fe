"""One run, whole: the load, what happens meanwhile and the server's own metrics in one result; and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING

from loadtest.results.result import Result
from loadtest.run.events import GRACE_SECONDS, Events
from loadtest.run.scrape import Scraper
from loadtest.scenario.model import Scenario

if TYPE_CHECKING:
    from loadtest.run.progress import Progress


class Interrupts:
    """Ctrl-C and SIGTERM: an exception as long as nothing would be lost, afterwards a request to end.

    stop: set by the first of them. The second is a KeyboardInterrupt always.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the first interrupt sets `stop` and nothing else: there are results to save."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The signal handler."""
        again = self.stop.is_set()
        self.stop.set()
        if again or not self._held:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle Ctrl-C and SIGTERM inside; outside of the main thread nothing changes."""
    made = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield made
        return
    before = {number: signal.signal(number, made.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield made
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_test(
    scenario: Scenario,
    *,
    stop: threading.Event,
    num_ids: Mapping[str, int],
    ceiling: float = 0.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run a scenario that was checked; partial where `stop` was set before its end, LoadError where it cannot be run.

    num_ids: of every table of the scenario; ceiling: what a calibration found, 0 without one.
    """
    from loadtest.run.worker_pool import run

    events, scraper = Events(scenario.events), _scraper(scenario)

    def begin(begin_ns: int) -> None:
        events.begin(begin_ns)
        if scraper is not None:
            scraper.begin(begin_ns)

    try:
        result = run(scenario, on_progress=on_progress, on_begin=begin, stop=stop, ceiling=ceiling, num_ids=num_ids)
    except BaseException:
        events.end(grace=0.0)
        if scraper is not None:
            scraper.end(wait=False)
        raise
    if result.partial:
        stop.set()
    if scraper is not None:
        result.samples = scraper.end()
        result.marks += [scraper.failure] if scraper.failure else []
    result.marks = sorted(result.marks + events.end(0.0 if result.partial else GRACE_SECONDS), key=lambda mark: mark.at)
    return result


def _scraper(scenario: Scenario) -> Scraper | None:
    from loadtest.scenario.target import api_headers, tls_context

    if not scenario.scrape:
        return None
    verify = tls_context(scenario) if scenario.url.startswith("https:") else True
    return Scraper(scenario.url, dict(api_headers(scenario)), verify=verify)
