"""The server's metrics beside the run: what is read, what is kept, and that no failure of it ends anything."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from loadtest.errors import LoadError
from loadtest.run.scrape import Scraper, parse
from loadtest.run.session import load_test
from loadtest.scenario.model import Scenario

pytestmark = pytest.mark.slow

TEXT = """\
# HELP embstore_swaps_total Times the set of served versions changed.
# TYPE embstore_swaps_total counter
embstore_swaps_total 3.0
embstore_swaps_created 1.7e+09
embstore_ids_total{table="item",status="found"} 1.25e+06 1700000000000
embstore_version_info{table="a\\"b}\\\\",version="1"}\t1
embstore_lookup_duration_seconds_bucket{table="item",protocol="json",le="0.001"} 7
embstore_lookup_duration_seconds_bucket{table="item",protocol="json",le="+Inf"} 9
embstore_lookup_duration_seconds_sum{table="item",protocol="json"} 0.5
embstore_stage_duration_seconds_bucket{stage="queue",le="0.001"} 7
embstore_stage_duration_seconds_count{stage="queue"} 7
embstore_version_age_seconds NaN
embstore_queue_depth +Inf
embstore_broken{table="item 1
embstore_wrong one
process_resident_memory_bytes 1.5e+08
python_gc_collections_total{generation="0"} 12
embstore
"""


@contextmanager
def answering(answer: Callable[[int], tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server whose k-th reply is `answer(k)`; its address, and the API keys it was shown."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/metrics"
            status, body = answer(len(keys))
            keys.append(self.headers.get("x-api-key", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", keys
        finally:
            server.shutdown()
            thread.join()


def scrape(url: str, seconds: float, headers: dict[str, str] | None = None) -> Scraper:
    """A scraper of a run that is over."""
    scraper = Scraper(url, headers)
    scraper.begin(time.perf_counter_ns())
    time.sleep(seconds)
    return scraper


def test_series_that_matter_are_kept_as_they_are_printed() -> None:
    """Ours and the process's, with labels as written, one histogram's buckets only, and no value that is no number."""
    assert parse(TEXT) == {
        "embstore_swaps_total": 3.0,
        'embstore_ids_total{table="item",status="found"}': 1.25e6,
        'embstore_version_info{table="a\\"b}\\\\",version="1"}': 1.0,
        'embstore_lookup_duration_seconds_bucket{table="item",protocol="json",le="0.001"}': 7.0,
        'embstore_lookup_duration_seconds_bucket{table="item",protocol="json",le="+Inf"}': 9.0,
        'embstore_lookup_duration_seconds_sum{table="item",protocol="json"}': 0.5,
        'embstore_stage_duration_seconds_count{stage="queue"}': 7.0,
        "process_resident_memory_bytes": 1.5e8,
    }


def test_a_label_without_an_end_takes_no_time() -> None:
    """A line of a hostile server that never closes what it opened is left out at once."""
    begun = time.monotonic()
    assert parse('embstore_a{x="' + '\\"' * 100_000) == {}
    assert parse("embstore_a{" + 'x="",' * 100_000) == {}
    assert time.monotonic() - begun < 10


def test_samples_are_a_second_apart_and_know_when_they_were_taken() -> None:
    """One at the beginning, one a second later, one at the end; the headers go with each."""
    with answering(lambda k: (200, f"embstore_swaps_total {k}\n".encode())) as (url, keys):
        scraper = scrape(f"{url}/", 1.5, {"x-api-key": "secret"})
        samples = scraper.end()
    assert [sample.values for sample in samples] == [{"embstore_swaps_total": float(k)} for k in range(len(samples))]
    assert len(samples) >= 3
    times = [sample.at for sample in samples]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] >= 1.5
    assert set(keys) == {"secret"}
    assert scraper.failure is None


def test_failures_are_counted_and_told_once() -> None:
    """A server that does not answer for a while costs those samples; one mark says how many, when first, and why."""
    with answering(lambda k: (503, b"") if k == 1 else (200, b"embstore_swaps_total 1\n")) as (url, _):
        scraper = scrape(url, 1.5)
        samples = scraper.end()
    assert (scraper.tried, scraper.failed) == (len(samples) + 1, 1)
    mark = scraper.failure
    assert mark is not None
    assert (mark.name, mark.ok) == ("no metrics", False)
    assert mark.detail == f"1 of {scraper.tried} scrapes failed: {url}/metrics answers 503"
    assert 1 <= mark.at < 30


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, b"no"), "answers 404"),
        ((200, b"<html>"), "no series that begins with embstore_ or process_"),
        ((200, b"\xff\xfe\x00"), "no series that begins with embstore_ or process_"),
    ],
    ids=["404", "html", "bytes"],
)
def test_a_server_without_metrics_is_one_mark(answer: tuple[int, bytes], reason: str) -> None:
    """Another server's page, or none, is no sample and no exception."""
    with answering(lambda _: answer) as (url, _):
        scraper = scrape(url, 0.1)
        assert scraper.end() == []
    assert scraper.failure is not None
    assert reason in scraper.failure.detail
    assert "\n" not in scraper.failure.detail


def test_a_server_that_is_gone_is_one_mark() -> None:
    """No connection, and an address that is none: counted like any other failure."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://[bad"):
        scraper = scrape(url, 0.1)
        assert scraper.end() == []
        assert scraper.failure is not None
        assert scraper.failed == scraper.tried


def test_a_server_that_is_silent_does_not_hold_the_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that nobody answers run into their limit, and the end waits no longer than that."""
    monkeypatch.setattr("loadtest.run.scrape.TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        scraper = scrape(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.1)
        begun = time.monotonic()
        assert scraper.end() == []
        assert time.monotonic() - begun < 10
    assert scraper.failure is not None
    assert "timed out" in scraper.failure.detail


def test_a_run_that_fails_ends_its_scraper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the run is raised, and nobody goes on asking the server for its metrics."""

    def fail(*_: object, on_begin: Callable[[int], None], **__: object) -> None:
        on_begin(time.perf_counter_ns())
        raise LoadError("a generator process died")

    monkeypatch.setattr("loadtest.run.worker_pool.run", fail)
    with answering(lambda _: (200, b"embstore_swaps_total 1\n")) as (url, _):
        with pytest.raises(LoadError, match="a generator process died"):
            load_test(Scenario(url=url, scrape=True), stop=threading.Event(), num_ids={})
        for thread in threading.enumerate():
            if thread.name == "scraper":
                thread.join(30)
                assert not thread.is_alive()


def test_a_page_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes than any server's metrics have are a failure, not memory."""
    monkeypatch.setattr("loadtest.run.scrape.MAX_BYTES", 1 << 20)
    with answering(lambda _: (200, b"embstore_swaps_total 1\n" * 100_000)) as (url, _):
        scraper = scrape(url, 0.1)
        assert scraper.end() == []
    assert scraper.failure is not None
    assert "sends more than 1 MiB" in scraper.failure.detail


def test_a_run_that_ended_in_its_warmup_has_no_samples() -> None:
    """Before second 0 nothing is read, and a run that was never begun has nothing to end."""
    with answering(lambda _: (200, b"embstore_swaps_total 1\n")) as (url, keys):
        scraper = Scraper(url)
        scraper.begin(time.perf_counter_ns() + 60_000_000_000)
        time.sleep(0.1)
        assert scraper.end() == []
        assert keys == []
    assert Scraper(url).end() == []
