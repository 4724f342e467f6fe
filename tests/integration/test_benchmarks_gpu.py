"""`python -m benchmarks.gpu`: what it says without a card, when a part fails or hangs, and every part on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import COLUMNS, PARTS, run_part, table


def test_without_a_card_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A machine without a CUDA device is told so, and that is no failure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) == 0
    assert capsys.readouterr().out == "no CUDA device: nothing to measure\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine without torch is told what to install; a part that lacks something else says what."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch", None)
        assert gpu.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu needs torch: pip install numpy torch triton\n"

    def lacking(_: str) -> None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setitem(gpu_parts.PARTS, "lacking", lacking)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="needs numba: pip install"):
        gpu_parts.main("lacking", "cpu")


def test_the_parts_fit_in_eight_minutes() -> None:
    """All parts together, each as long as it may take, stay under eight minutes; each has its function."""
    assert sum(part.seconds for part in PARTS.values()) < 8 * 60
    assert list(PARTS) == list(gpu_parts.PARTS)


def test_the_table_has_a_line_a_row() -> None:
    """Cells that a row lacks are empty, and text cannot break the table."""
    lines = table(
        [{"part": "plain", "what": "a|b", "us": 1.5}, {"part": "tests", "note": "x\ny"}], "a card"
    ).splitlines()
    assert lines[:3] == ["a card", "", "| " + " | ".join(COLUMNS) + " |"]
    assert lines[4] == "| plain | a\\|b |  | 1.5 |  |  |  |  |"
    assert lines[5] == "| tests |  |  |  |  |  |  | x y |"


def test_a_part_that_hangs_keeps_its_rows() -> None:
    """A part is ended when its time is over; what it found before is in the table beside a row that says so."""
    code = 'print("{\\"what\\": \\"found\\"}", flush=True); import time; time.sleep(60)'
    found = run_part("kernels", [sys.executable, "-c", code], 2)
    note = "not finished in 2 s: what is missing was not measured"
    assert found == [{"part": "kernels", "what": "found"}, {"part": "kernels", "what": "FAILED", "note": note}]


def test_a_part_that_fails_says_its_last_line() -> None:
    """A part's exit code other than 0 is a row with the last line of its complaints."""
    found = run_part("http", [sys.executable, "-c", "import sys; print('no JSON'); sys.exit('no port')"], 60)
    assert found == [{"part": "http", "what": "FAILED", "note": "exit code 1: no port"}]


def test_a_failed_part_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One failed row makes the exit code 1; the table is in the file all the same, with the other parts' rows."""
    rows = {"plain": [{"part": "plain", "what": "fine"}], "tests": [{"part": "tests", "what": "FAILED", "note": "why"}]}
    monkeypatch.setattr(gpu, "run_part", lambda name, *_: rows[name])
    out = tmp_path / "gpu.md"
    assert gpu.main(["--smoke", "--out", str(out), "--part", "plain"]) == 0
    assert gpu.main(["--smoke", "--out", str(out), "--part", "plain", "--part", "tests"]) == 1
    assert "| plain | fine |" in out.read_text()
    assert "| tests | FAILED |" in out.read_text()


def test_a_kernel_with_wrong_vectors_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is of vectors that are the formula's; others are a row that says so."""
    from embstore.bench.kernels import make_contender
    from embstore.schemes import Full

    contender = make_contender("full", "", {}, 16, "float32", 64_000, "cpu")
    monkeypatch.setattr(Full, "lookup", lambda *arguments: arguments[-1].zero_())
    (row,) = gpu_parts.lookups("cpu", contender, (10,))
    assert row["what"] == "FAILED"
    assert "the kernel's vectors are not the formula's" in str(row["note"])


@pytest.mark.parametrize("name", ["plain", "pipeline", "http", "training"])
def test_a_part_measures_on_the_cpu(name: str) -> None:
    """Every row of a part says what it is of and has a time; nothing fails."""
    rows = [row for row in gpu_parts.PARTS[name]("cpu") if row["what"] != "copy"]
    assert rows
    assert all(row["what"] != "FAILED" and row["us"] and row["ids"] for row in rows)


def test_kernels_of_every_scheme_and_dtype_are_measured() -> None:
    """Every scheme has its row in float32, and in float16 and int8 where rows of it get smaller."""
    from embstore.schemes import SCHEMES

    whats = [str(row["what"]) for row in gpu_parts.kernels("cpu")]
    assert "FAILED" not in whats
    assert {what.split()[0] for what in whats} == set(SCHEMES)
    assert {what.split()[-3] for what in whats if what.startswith("qr mult")} == {"float32", "float16", "int8"}
