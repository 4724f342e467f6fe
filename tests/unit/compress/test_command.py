"""`embstore compress`: what it prints, what it refuses, what it finds before the work."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.compressing import VECTORS

from embstore import open_store
from embstore.common.progress import make_reporter
from embstore.compress import run as compress_run
from embstore.compress.run import Job, compress
from embstore.errors import ConfigError, Conflict, StoreError


def test_without_a_table_nothing_is_published(cli_run: Any, vectors: Path, counts: Path, tmp_path: Path) -> None:
    """Tables for people on stdout, plain lines on stderr, no store."""
    store = tmp_path / "store"
    code, out, err = cli_run(vectors, "--scheme", "hash", "--ratio", 4, "--counts", counts, "--store", store)
    assert code == 0, err
    for shown in ("6,400", "4.0x", "relative error, weighted by count", "recall@10 of 400 ids, cosine", "hot", "p95"):
        assert shown in out
    assert "nothing is published" in out
    assert re.search(r"s  read 400 vectors of 16 dimensions, \d+ of them with a count\n", err)
    assert not store.exists()


def test_for_programs_it_prints_json_and_nothing_else(cli_run: Any, vectors: Path, tmp_path: Path) -> None:
    """Bytes, errors and the published version; options reach the scheme; no label moves under --no-promote."""
    store = tmp_path / "store"
    line = [vectors, "--scheme", "memcom", "--budget", "10KB", "--set", "bias=true", "--table", "item"]
    code, out, err = cli_run(*line, "--store", store, "--no-promote", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["table"], answer["version"], answer["label"]) == ("item", 1, None)
    assert answer["parameters"]["bias"] is True
    assert answer["num_bytes"] <= answer["budget_bytes"] == 10_000
    assert 0 < answer["quality"]["relative_error_unweighted"] < 1
    assert open_store(store).labels("item") == {}
    code, out, err = cli_run(*line, "--store", store, "--label", "canary")
    assert (code, open_store(store).resolve("item", "canary")) == (0, 2)
    assert "published item version 2, label canary moved to it" in out


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, ["--scheme", "hash"], "give the size as a budget or as a ratio, exactly one of them"),
        (2, ["--scheme", "hash", "--ratio", "4", "--budget", "1MB"], "exactly one of them"),
        (2, ["--ratio", "4"], "Missing option '--scheme'"),
        (2, ["--scheme", "hsh", "--ratio", "4"], "no scheme named 'hsh'.*did you mean 'hash'"),
        (2, ["--scheme", "hash", "--ratio", "0.5"], "ratio must be at least 1 .*, got 0.5"),
        (2, ["--scheme", "hash", "--ratio", "nan"], "ratio must be at least 1 .*, got nan"),
        (2, ["--scheme", "hash", "--budget", "lots"], "budget must be bytes above 0, .* got 'lots'"),
        (2, ["--scheme", "hash", "--budget", "1MB"], "1,000,000 bytes is more than the whole .* 25,600 bytes"),
        (2, ["--scheme", "hash", "--budget", "8"], "hash cannot be stored in 8 bytes here: the least is 64"),
        (2, ["--scheme", "hash", "--budget", "8", "--dtype", "int8"], "hash with int8 rows .* 8 bytes .* is 24"),
        (2, ["--scheme", "hash", "--ratio", "4", "--dtype", "int2"], "dtype must be one of float32, .* got 'int2'"),
        (2, ["--scheme", "memcom", "--ratio", "17"], "memcom cannot be stored in .* bytes here"),
        (2, ["--scheme", "hash", "--ratio", "4", "--set", "sides=6"], "hash has no option 'sides'"),
        (2, ["--scheme", "hash", "--ratio", "4", "--set", "sides"], "expected KEY=VALUE, .* got 'sides'"),
        (2, ["--scheme", "hash", "--ratio", "4", "--seed", "-1"], "seed must be at least 0, got -1"),
        (2, ["--scheme", "hash", "--ratio", "4", "--html", "/no/such/r.html"], "no folder /no/such"),
        (2, ["--scheme", "hash", "--ratio", "4", "--html", "/"], "it is a folder"),
        (2, ["--scheme", "hash", "--ratio", "4", "--table", "a/b"], "table"),
        (2, ["--scheme", "hash", "--ratio", "4", "--table", "a", "--label", "7"], "label"),
        (1, ["--scheme", "hash", "--ratio", "4", "--counts", "/no/counts.npy"], "/no/counts.npy: no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli_run: Any, vectors: Path, code: int, arguments: Any, says: str) -> None:
    """The message names what was wrong and what would be right; the exit code says of what kind it is."""
    ended, out, err = cli_run(vectors, *arguments, "--json")
    assert (ended, out) == (code, "")
    assert err.count("\n") == 1
    assert re.search(says, err), err


def test_a_store_that_cannot_be_written_is_found_before_the_fit(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that cannot be written is refused before anything is fitted."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(compress_run, "fit_within", lambda *_, **__: pytest.fail("fitted"))
    job = Job(vectors=vectors, scheme="hash", ratio=4, table="item")
    with pytest.raises(StoreError):
        compress(job, store=open_store(tmp_path / "file" / "store"))
    with pytest.raises(ConfigError, match="needs a store"):
        compress(job)


def test_what_a_label_cannot_move_to_is_found_before_the_fit(
    vectors: Path, keyed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of another type, and a budget that is no compression; asked for, or with no label, the type may change."""
    store = open_store(tmp_path / "store")
    job = partial(Job, scheme="hash", ratio=4, table="item")
    compress(job(vectors=keyed), store=store)
    with monkeypatch.context() as patch:
        patch.setattr(compress_run, "fit_within", lambda *_, **__: pytest.fail("fitted"))
        with pytest.raises(Conflict, match="version 1, whose ids are strings, and those of the new one are integers"):
            compress(job(vectors=vectors), store=store)
        with pytest.raises(ConfigError, match=r"25,601 bytes .*: 25,600 bytes, 400 vectors of 16 float32"):
            compress(Job(vectors=vectors, scheme="hash", budget=25_601))
    assert compress(job(vectors=vectors, label=None), store=store).version == 2
    assert compress(job(vectors=vectors, new_id_type=True), store=store).version == 3
    assert store.resolve("item") == 3


def test_it_says_that_vectors_have_another_length(cli_run: Any, tmp_path: Path) -> None:
    """The report names both vector lengths, for people and for programs, when the label moves."""
    np.save(tmp_path / "short.npy", VECTORS[:, :8])
    store = open_store(tmp_path / "store")
    store.publish("item", VECTORS)
    line = [tmp_path / "short.npy", "--scheme", "hash", "--ratio", 4, "--table", "item", "--store", store.root]
    assert json.loads(cli_run(*line, "--json", "--no-promote")[1])["embedding_dim_before"] is None
    code, out, _ = cli_run(*line)
    assert code == 0
    assert "published item version 3, label latest moved to it, embedding_dim 16 -> 8\n" in out
    assert json.loads(cli_run(*line, "--json")[1])["embedding_dim_before"] == 8


def test_progress_is_a_bar_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal shows steps, a log only facts, programs nothing."""

    class Terminal:
        """A stream that says it is one."""

        def __init__(self) -> None:
            self.written = ""

        def write(self, text: str) -> int:
            """Kept."""
            self.written += text
            return len(text)

        def flush(self) -> None:
            """Nothing to do."""

        def isatty(self) -> bool:
            """Yes."""
            return True

    for stream, silent, holds in (
        (Terminal(), False, ("a fact", "k-means")),
        (None, False, ("a fact",)),
        (None, True, ()),
    ):
        with make_reporter(silent=silent, stream=stream) as report:  # type: ignore[arg-type]
            report.note("a fact")
            report.advanced("k-means", 1, 2)
            report.advanced("distilling", 2, 2)
        written = stream.written if stream else capsys.readouterr().err
        assert all(text in written for text in holds)
        assert ("distilling" in written) == (stream is not None)
        assert bool(written) == bool(holds)
