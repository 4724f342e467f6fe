"""The benchmarks run for every scheme and count the right bytes; what they measure is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embstore import cli, schemes
from embstore.bench import kernels
from embstore.bench.floor import bytes_read, lines_read, make_memory, runs_of
from embstore.bench.schemes import Row, write_markdown
from embstore.errors import ConfigError
from embstore.kernels.cpu.floor import gather_runs
from embstore.schemes import SCHEMES
from embstore.schemes.base import Scheme
from embstore.train.demo import write_demo


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (schemes.Full(1000, 64), 256),
        (schemes.Hash(1000, 16, num_buckets=10), 64),
        (schemes.QR(1000, 64, num_buckets=50), 512),
        (schemes.MEmCom(1000, 64, num_buckets=50), 256 + 64),
        (schemes.MEmCom(1000, 32, num_buckets=50, bias=True, offset=True), 128 + 64),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else str(value),
)
def test_the_floor_reads_the_lines_that_the_formula_reads(module: Scheme, expected: int) -> None:
    """Rows of whole lines count as they are, a single number counts the line it is in."""
    config, tensors = module.export()
    lines_BL, total = lines_read(type(module), config, tensors, torch.randint(1000, (200,)))
    assert bytes_read(lines_BL) == expected
    assert int(lines_BL.max()) < total


def test_a_row_across_lines_counts_each() -> None:
    """40 bytes a row, 64 a line: rows lie in one line or in two, each line once."""
    module = schemes.Full(16, 10)
    lines_BL, _ = lines_read(schemes.Full, module.config, module.export()[1], torch.arange(16))
    expected = [sorted({i * 40 // 64, (i * 40 + 39) // 64}) for i in range(16)]
    assert [sorted(line for line in lines if line >= 0) for lines in lines_BL.tolist()] == expected


def test_neighbouring_lines_are_one_run() -> None:
    """Lines in any order, with gaps and fillers, become runs that hold exactly these lines."""
    lines_BL = np.array([[9, 3, 2, 4, -1], [7, -1, -1, -1, -1], [5, 4, 3, 2, 1]], np.int32)
    assert runs_of(lines_BL).tolist() == [[[2, 3], [9, 1]], [[7, 1], [0, 0]], [[1, 5], [0, 0]]]


def test_the_floor_fills_rows_with_what_it_read() -> None:
    """Every line of an id ends up in its row of the output; no row keeps what it held."""
    memory = make_memory(10)
    memory[:] = np.repeat(np.arange(10, dtype=np.float32), 16)
    runs = np.array([[[3, 2], [0, 0]], [[7, 1], [0, 0]], [[1, 2], [8, 1]]], np.int32)
    out = np.full((3, 32), np.nan, np.float32)
    gather_runs(memory, runs, out)
    assert out[0].tolist() == [3] * 16 + [4] * 16
    assert out[1].tolist() == [7] * 32
    assert out[2].tolist() == [8] * 16 + [2] * 16
    assert memory.ctypes.data % 64 == 0


@pytest.mark.parametrize("zipf", [None, 1.05])
def test_ids_are_in_range_and_as_skewed_as_asked(zipf: float | None) -> None:
    """Uniform ids have no favourite, Zipf ids do."""
    ids = kernels.make_ids(1_000_000, 10_000, zipf, 3)
    assert ids.shape == (3, 10_000)
    assert ids.min() >= 0
    assert ids.max() < 1_000_000
    assert (ids == 0).mean() < 0.001 if zipf is None else (ids == 0).mean() > 0.01


def test_the_command_measures_every_scheme() -> None:
    """`embstore bench kernels --json`: a row for each scheme, with its ratios."""
    small = ["--table-size", "2MB", "--dim", "16", "--batch", "100", "--rounds", "1", "--json"]
    ran = subprocess.run([sys.executable, "-m", "embstore", "bench", "kernels", *small], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {row["scheme"] for row in found["rows"]} == set(SCHEMES)
    for row in found["rows"]:
        assert min(row["kernel_us"], row["eager_us"], row["floor_us"]) > 0
        assert row["kernel_over_floor"] == pytest.approx(row["kernel_us"] / row["floor_us"], rel=0.01)
    assert found["machine"]["cores"] >= 1


def test_training_is_compared_with_nn_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`embstore bench train --json` has nn.Embedding first, as 1, and each scheme's share of its speed."""
    small = [str(write_demo(tmp_path)), "--steps", "4", "--rounds", "2", "--ratio", "2", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["embstore", "bench", "train", *small])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["nn.Embedding", *SCHEMES]
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["kernels", "--scheme", "memcon"], "did you mean 'memcom'"),
        (["kernels", "--dtype", "int7"], "dtype must be one of"),
        (["kernels", "--zipf", "1"], "--zipf must be above 0, below 10 and not 1"),
        (["kernels", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["kernels", "--dim", "20"], "--dim must be a multiple of 16, got 20"),
        (["kernels", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["schemes", "--ratio", "0.5"], "--ratio must be at least 1"),
        (["schemes", "--markdown", "nowhere.md"], "cannot read nowhere.md"),
        (["train", "nowhere.toml", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "nowhere.toml"], "nowhere.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_means_nothing_is_one_line(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what would be right, before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["embstore", "bench", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_a_table_is_written_between_its_markers(tmp_path: Path) -> None:
    """The document keeps everything else; without the markers it is refused and left alone."""
    path = tmp_path / "schemes.md"
    begin = "<!-- made by `embstore bench schemes --ratio 2` -->"
    path.write_text(f"before\n{begin}\nold\n<!-- end -->\nafter\n")
    row = Row(scheme="pq", num_bytes=1234, ratio=2, ndcg=0.1, of_full=0.5, lookup_us=3, train_seconds=1)
    write_markdown(path, [row], {"cpu": "some", "load": 1}, ratio=2, config=None)
    text = path.read_text()
    assert text.startswith(f"before\n{begin}\n| scheme |")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| pq | 1,234 | 2 | 0.1000 | 50% | 3.0 | 1.0 |" in text
    assert "Machine: cpu some." in text
    assert "old" not in text
    with pytest.raises(ConfigError, match="has no lines"):
        write_markdown(path, [row], {}, ratio=3, config=None)
    assert path.read_text() == text
