"""`embstore compress`: what it takes, what it makes of it, what it reports, and what it refuses."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from embstore import cli, fitting, open_store
from embstore.common.progress import make_reporter
from embstore.compress import run as compress_run
from embstore.compress.fit import fit_within
from embstore.compress.inputs import Source, read_source
from embstore.compress.measure import measure, nearest_neighbours
from embstore.compress.run import Job, compress
from embstore.errors import ConfigError, Conflict, DataError, StoreError
from embstore.schemes import SCHEMES, scheme_class

N, D = 400, 16
RANDOM = np.random.default_rng(20)
CENTRES = RANDOM.normal(size=(20, D))
VECTORS = (CENTRES[RANDOM.integers(20, size=N)] + 0.2 * RANDOM.normal(size=(N, D))).astype(np.float32)
COUNTS = RANDOM.permutation((2000 / np.arange(1, N + 1)).astype(np.int64))
KEYS = [f"item {key}" for key in RANDOM.permutation(N)]


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A file of vectors whose ids are row numbers."""
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """A file of counts in row order."""
    np.save(tmp_path / "counts.npy", COUNTS)
    return tmp_path / "counts.npy"


@pytest.fixture
def keyed(tmp_path: Path) -> Path:
    """A file of vectors under string keys."""
    pl.DataFrame({"id": KEYS, "v": VECTORS.tolist()}).write_parquet(tmp_path / "keyed.parquet")
    return tmp_path / "keyed.parquet"


@pytest.fixture
def cli_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `embstore compress` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["embstore", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return run


# ---- every scheme, end to end ----------------------------------------------------------------------------------------


def smallest(make: Callable[[int], Any]) -> Any:
    """What `make(budget)` gives for the first budget, of ever larger ones, that the scheme can do with."""
    for factor in (4, 2, 1, 0.5, 0.25, 0.1, 0.01):
        try:
            return make(int(N * D * 4 / factor))
        except ConfigError as error:
            refused = error
    raise refused


def any_module(name: str) -> Any:
    """A module of the scheme, fitted to something."""
    return smallest(lambda budget: fit_within(scheme_class(name), torch.from_numpy(VECTORS), budget))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation is short: these tests ask whether it works, not how well."""
    monkeypatch.setattr(fitting, "distill", partial(fitting.distill, steps=30, batch_size=256))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_compressed_into_and_published(
    name: str, keyed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store gives the fitted module's vectors, the report's errors are theirs, its bytes are the file's."""
    pl.DataFrame({"id": KEYS, "count": COUNTS}).write_parquet(tmp_path / "counts.parquet")
    fitted = list[Any]()
    monkeypatch.setattr(compress_run, "fit_within", lambda *a, **k: fitted.append(fit_within(*a, **k)) or fitted[-1])
    store = open_store(tmp_path / "store")
    job = partial(Job, vectors=keyed, scheme=name, counts=tmp_path / "counts.parquet", table="item", seed=3)
    result = smallest(lambda budget: compress(job(budget=budget), store=store))
    module, table, stored = fitted[-1], store.load("item"), store.read_version("item", 1)

    order_N = np.argsort(-COUNTS, kind="stable")
    served_ND = table.lookup(KEYS)
    with torch.no_grad():
        made_ND = module(torch.arange(N)).numpy()
    np.testing.assert_allclose(served_ND[order_N], made_ND, rtol=1e-4, atol=1e-5 * np.abs(made_ND).max())

    own = [a for array, a in stored.arrays.items() if array in module.layout(module.export()[0])]
    assert result.num_bytes == sum(array.nbytes for array in own) == module.num_bytes() <= result.budget_bytes
    assert result.ratio == pytest.approx(N * D * 4 / result.num_bytes)
    error = np.square(VECTORS - served_ND).sum(1) @ COUNTS / (np.square(VECTORS).sum(1) @ COUNTS)
    assert result.quality.relative_error == pytest.approx(math.sqrt(error), rel=1e-3, abs=1e-6)
    assert result.version == 1
    assert table.manifest is not None
    assert table.manifest.hot_ids == [KEYS[row] for row in order_N if COUNTS[row] > 0]
    assert table.manifest.metrics["compression"]["relative_error"] == result.quality.relative_error
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_rows_stay_within_the_budget(name: str) -> None:
    """With rows of int8 the module takes at most the budget, and more than float32 rows would use of it."""
    made = any_module(name)
    packable = any(slot.rows for slot in made.layout(made.export()[0]).values())
    if not packable:
        with pytest.raises(ConfigError, match="gets smaller as int8"):
            fit_within(scheme_class(name), torch.from_numpy(VECTORS), N * D * 8, dtype="int8")
        return
    budget, module = smallest(
        lambda budget: (budget, fit_within(scheme_class(name), torch.from_numpy(VECTORS), budget, dtype="int8"))
    )
    assert module.num_bytes("int8") <= budget
    assert module.num_bytes("int8") < module.num_bytes("float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_a_budget_is_used_to_the_last_row(dtype: str) -> None:
    """One more shared row would not fit."""
    for budget in (1000, 5000, 12345):
        module = fit_within(scheme_class("hash"), torch.from_numpy(VECTORS), budget, dtype=dtype)
        row = {"float32": 64, "float16": 32, "bfloat16": 32, "int8": 24, "int4": 12}[dtype]
        assert module.num_bytes(dtype) == min(budget // row, N) * row


def test_a_full_table_of_int8_fits_where_float32_would_not() -> None:
    """The scheme's float32 size is not what counts."""
    module = fit_within(scheme_class("full"), torch.from_numpy(VECTORS), N * (D + 8), dtype="int8")
    assert module.num_bytes("int8") == N * (D + 8)
    with pytest.raises(ConfigError, match=f"the least is {N * (D + 8):,}"):
        fit_within(scheme_class("full"), torch.from_numpy(VECTORS), N * (D + 8) - 1, dtype="int8")


def test_the_report_is_of_packed_rows(vectors: Path, tmp_path: Path) -> None:
    """A full table of int8 rows has their error, and the store gives these rows."""
    store = open_store(tmp_path / "store")
    result = compress(Job(vectors=vectors, scheme="full", ratio=2, dtype="int4", table="item"), store=store)
    served_ND = store.load("item").lookup(np.arange(N))
    error = math.sqrt(np.square(VECTORS - served_ND).sum() / np.square(VECTORS).sum())
    assert result.quality.relative_error_unweighted == pytest.approx(error, rel=1e-5)
    assert 0.01 < error < 0.1
    assert result.quality.relative_error is None
    assert result.num_bytes == N * (D // 2 + 4)


def test_a_full_table_reports_no_loss(vectors: Path, counts: Path) -> None:
    """Ratio 1 keeps every float: no error, every neighbour."""
    result = compress(Job(vectors=vectors, scheme="full", ratio=1, counts=counts))
    assert (result.quality.relative_error, result.quality.relative_error_unweighted) == (0, 0)
    assert result.quality.recall is not None
    assert (result.quality.recall.cosine, result.quality.recall.inner_product) == (1, 1)
    assert result.quality.error_by_popularity == [0] * 10
    assert (result.table, result.version, result.label) == (None, None, None)


def test_the_seed_decides(vectors: Path) -> None:
    """The same job gives the same figures."""
    job = Job(vectors=vectors, scheme="hash", ratio=4, seed=5)
    assert compress(job).quality == compress(job).quality


# ---- row order -------------------------------------------------------------------------------------------------------


def test_rows_go_by_falling_count_and_ids_keep_their_vectors() -> None:
    """Keys, counts and vectors move together; equal counts stay as they were; row numbers become ids."""
    counts_N = np.array([1.0, 5.0, 1.0, 7.0])
    for keys, expected in ((["a", "b", "c", "d"], ["d", "b", "a", "c"]), (np.array([9, 8, 7, 6]), [6, 8, 9, 7])):
        moved = Source(VECTORS[:4], keys, counts_N).by_count()
        assert moved.ids is not None
        assert list(moved.ids) == expected
        np.testing.assert_array_equal(moved.vectors_ND, VECTORS[[3, 1, 0, 2]])
    numbered = Source(VECTORS[:4], None, counts_N).by_count()
    assert isinstance(numbered.keys, np.ndarray)
    assert numbered.keys.tolist() == [3, 1, 0, 2]
    fallen = Source(VECTORS[:4], None, np.array([3.0, 2.0, 2.0, 0.0]))
    assert fallen.by_count() is fallen
    assert fallen.hottest(9) == [0, 1, 2]


@pytest.mark.parametrize("keep_order", [False, True])
def test_row_numbers_give_way_only_where_it_helps(
    vectors: Path, counts: Path, tmp_path: Path, keep_order: bool
) -> None:
    """Ids without keys stay row numbers, unless the scheme gives hot ids more; lookups find the same vectors."""
    store = open_store(tmp_path / "store")
    job = partial(Job, vectors=vectors, counts=counts, keep_order=keep_order, table="item")
    compress(job(scheme="pq", ratio=1.5), store=store)
    assert store.load("item").ids.kind == "dense"
    result = compress(job(scheme="hash", ratio=4), store=store)
    table = store.load("item")
    assert table.ids.kind == ("dense" if keep_order else "int64")
    assert result.id_space_bytes == (0 if keep_order else table.ids.num_bytes())
    hottest = int(COUNTS.argmax())
    error = np.linalg.norm(table.lookup([hottest]) - VECTORS[hottest]) / np.linalg.norm(VECTORS[hottest])
    assert error < 0.7


# ---- what is read ----------------------------------------------------------------------------------------------------


def state_dict(path: Path, held: Any, **options: Any) -> Path:
    """A torch file."""
    torch.save(held, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_state_dict_gives_its_only_table(tmp_path: Path, suffix: str, zipped: bool) -> None:
    """Whatever else it holds, in either format of torch, in half precision too."""
    held = {"bias": torch.ones(3), "epoch": 7, "item.weight": torch.from_numpy(VECTORS).bfloat16()}
    path = state_dict(tmp_path / f"m{suffix}", held, _use_new_zipfile_serialization=zipped)
    source = read_source(path)
    np.testing.assert_array_equal(source.vectors_ND, held["item.weight"].float().numpy())
    assert source.vectors_ND.dtype == np.float32
    assert source.ids is None


def test_a_tensor_is_chosen_by_name(tmp_path: Path) -> None:
    """From a state dict, from a checkpoint around one, from a module's parameters, from safetensors."""
    tables = {"user": torch.randn(5, 3), "item": torch.from_numpy(VECTORS)}
    safetensors.torch.save_file({"user": tables["user"], "item": tables["item"].bfloat16()}, tmp_path / "t.safetensors")
    found = [
        read_source(state_dict(tmp_path / "a.pt", tables), tensor="item"),
        read_source(state_dict(tmp_path / "b.pt", {"epoch": 1, "state": tables}), tensor="state.item"),
        read_source(state_dict(tmp_path / "c.pt", torch.nn.Embedding.from_pretrained(tables["item"]).state_dict())),
        read_source(state_dict(tmp_path / "d.pt", tables["item"])),
    ]
    for source in found:
        np.testing.assert_array_equal(source.vectors_ND, VECTORS)
    packed = read_source(tmp_path / "t.safetensors", tensor="item")
    np.testing.assert_array_equal(packed.vectors_ND, tables["item"].bfloat16().float().numpy())


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/never", "w"))


BAD_STATES: dict[str, tuple[Any, str | None, str]] = {
    "foreign keys": (
        {"a": torch.ones(3), "b": torch.ones(2, 2).int()},
        None,
        r"no tensor of floats \[ids, dims\] among a float32 \[3\], b int32 \[2, 2\]",
    ),
    "two tables": (
        {"a": torch.ones(3, 2), "b": torch.ones(4, 2)},
        None,
        r"holds 2 tables, choose one with --tensor: a float32 \[3, 2\], b float32 \[4, 2\]",
    ),
    "no such name": ({"a": torch.ones(3, 2)}, "c", r"no tensor named 'c'; it holds a float32 \[3, 2\]"),
    "wrong one": ({"a": torch.ones(3)}, "a", r"vectors are floats \[ids, dims\], a float32 \[3\] is not"),
    "empty": ({}, None, "among nothing"),
    "a list": ([torch.ones(3, 2)], None, "holds a list, not a state dict"),
    "no rows": ({"a": torch.ones(0, 2)}, None, r"shape \[ids, dims\], got \[0, 2\]"),
    "code": ({"a": Evil()}, None, "not a file of tensors that can be read without running code"),
    "many": ({f"b{i}": torch.ones(1) for i in range(40)}, None, r"b11 float32 \[1\] and 28 more"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_state_dicts_that_hold_no_table_are_refused(case: str, tmp_path: Path) -> None:
    """The message lists names, dtypes and shapes."""
    held, tensor, says = BAD_STATES[case]
    with pytest.raises(DataError, match=says):
        read_source(state_dict(tmp_path / "m.pt", held), tensor=tensor)


def test_files_that_are_not_vectors_are_refused(tmp_path: Path, vectors: Path) -> None:
    """Missing, of another kind, damaged; a tensor is not chosen where there is but one."""
    (tmp_path / "broken.pt").write_bytes(b"not a zip")
    (tmp_path / "v.csv").write_text("1,2")
    for name, says in (
        ("none.npy", "no such file"),
        ("v.csv", r"vectors come as \.npy, .*\.pth"),
        ("broken.pt", "not a file of tensors"),
    ):
        with pytest.raises(DataError, match=says):
            read_source(tmp_path / name)
    with pytest.raises(ConfigError, match="--tensor is for"):
        read_source(vectors, tensor="item")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    """The first row is named, with its id where it has one."""
    wrong_ND = VECTORS.astype(np.float64)
    wrong_ND[[37, 90], 2] = bad
    np.save(tmp_path / "v.npy", wrong_ND)
    with pytest.raises(DataError, match=r"NaN, infinity or a number too large for float32, first in row 37$"):
        read_source(tmp_path / "v.npy")
    pl.DataFrame({"id": KEYS, "v": wrong_ND.tolist()}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError, match=f"first in row 37 \\(id '{KEYS[37]}'\\)"):
        read_source(tmp_path / "v.parquet")


@pytest.mark.parametrize("keys", [["a", "b", "c", "b"], [5, 7, -1, 7]])
def test_duplicate_ids_are_refused(tmp_path: Path, keys: Any) -> None:
    """The message names one and where it is again."""
    pl.DataFrame({"id": keys, "v": VECTORS[:4].tolist()}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError, match=f"id {keys[3]!r} is there twice, the second time in row 3"):
        read_source(tmp_path / "v.parquet")


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_joined_by_id(tmp_path: Path, keyed: Path, vectors: Path) -> None:
    """A missing id counts 0, an unknown one is left out; without keys the ids are row numbers, of any integer type."""
    pl.DataFrame({"key": [*KEYS[:3:-1], "unknown"], "n": [*COUNTS[:3:-1], 9]}).write_parquet(tmp_path / "c.parquet")
    found = read_source(keyed, counts=tmp_path / "c.parquet").counts_N
    np.testing.assert_array_equal(found, [0] * 4 + COUNTS[4:].tolist())
    ids = pl.Series([3, 399, 255, 60000], dtype=pl.UInt16)
    pl.DataFrame({"id": ids, "n": [0.5, 2.0, 1.0, 8.0]}).write_parquet(tmp_path / "r.parquet")
    found = read_source(vectors, counts=tmp_path / "r.parquet").counts_N
    assert found is not None
    assert {int(row): float(found[row]) for row in np.flatnonzero(found)} == {3: 0.5, 255: 1, 399: 2}
    np.save(tmp_path / "c.npy", COUNTS)
    found = read_source(keyed, counts=tmp_path / "c.npy").counts_N
    np.testing.assert_array_equal(found, COUNTS)


def frame(ids: Any, counts: Any) -> pl.DataFrame:
    """A file of ids and counts."""
    return pl.DataFrame({"id": ids, "count": counts})


BAD_COUNTS: dict[str, tuple[Any, str]] = {
    "short": (np.ones(N - 1), rf"one number per vector, shape \[{N}\], got float64 \[{N - 1}\]"),
    "matrix": (np.ones((N, 1)), rf"got float64 \[{N}, 1\]"),
    "texts": (np.array(["1"] * N), r"got <U1"),
    "negative": (np.where(np.arange(N) == 8, -3, 1), "finite and at least 0, got -3 in row 8"),
    "nan": (np.where(np.arange(N) == 9, np.nan, 1), "got nan in row 9"),
    "zeros": (np.zeros(N), f"counts of all {N} ids are 0"),
    "twice": (frame(["a", "a"], [1, 2]), "id 'a' is there twice"),
    "null": (frame(["a", None], [1, 2]), "must not be null"),
    "negative by id": (frame(["a", "b"], [1, -2]), "got -2 in row 1"),
    "infinite by id": (frame(["a", "b"], [math.inf, 2.0]), "got inf in row 0"),
    "other type": (frame([1, 2], [1, 2]), "its ids are Int64, those of the vectors String"),
    "strangers": (frame(["a", "b"], [1, 2]), f"none of its 2 ids is among the {N} ids"),
    "one column": (pl.DataFrame({"id": ["a"]}), "needs two columns, .* has id String"),
    "vectors": (frame(["a"], [[1.0]]), "needs two columns"),
    "ids last": (frame([0.5], ["a"]), "needs two columns"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_counts_that_cannot_be_are_refused(case: str, keyed: Path, tmp_path: Path) -> None:
    """Length, sign, NaN, duplicates, strangers: each with its numbers."""
    held, says = BAD_COUNTS[case]
    path = tmp_path / ("c.parquet" if isinstance(held, pl.DataFrame) else "c.npy")
    held.write_parquet(path) if isinstance(held, pl.DataFrame) else np.save(path, held)
    with pytest.raises(DataError, match=says):
        read_source(keyed, counts=path)


def test_counts_of_another_kind_are_refused(tmp_path: Path, keyed: Path) -> None:
    """Missing, another suffix, damaged."""
    (tmp_path / "c.csv").write_text("a,1")
    (tmp_path / "c.npy").write_bytes(b"not an array")
    (tmp_path / "c.parquet").write_bytes(b"not a table")
    for name, says in (("no.npy", "no such file"), ("c.csv", "counts come as"), ("c.npy", "c.npy"), ("c.parquet", "c")):
        with pytest.raises(DataError, match=says):
            read_source(keyed, counts=tmp_path / name)


# ---- the figures -----------------------------------------------------------------------------------------------------


def lookup_of(approx_ND: Any) -> Any:
    """A lookup of given vectors."""

    def lookup(rows_B: Any, out_BD: Any) -> None:
        out_BD[:] = approx_ND[rows_B]

    return lookup


@pytest.mark.parametrize("chunk", [1 << 22, 700])
def test_figures_are_their_formulas(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Errors, cosines of hot and tail ids, and tenths by popularity, against brute force."""
    monkeypatch.setattr("embstore.fitting.checks.CHUNK_ELEMENTS", chunk)
    approx_ND = (VECTORS + 0.3 * RANDOM.normal(size=VECTORS.shape)).astype(np.float32)
    measured = measure(VECTORS, lookup_of(approx_ND), counts_N=COUNTS.astype(float))
    quality, x, y = measured.quality, VECTORS.astype(float), approx_ND.astype(float)

    def error(rows: Any, w: Any) -> Any:
        return pytest.approx(math.sqrt((w * ((x - y)[rows] ** 2).sum(1)).sum() / (w * (x[rows] ** 2).sum(1)).sum()))

    order = np.argsort(-COUNTS, kind="stable")
    cosine_N = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert quality.relative_error == error(order, COUNTS[order])
    assert quality.relative_error_unweighted == error(order, 1.0)
    assert quality.error_by_popularity == [error(rows, 1.0) for rows in np.split(order, 10)]
    for name, rows in (("all", order), ("hot", order[: N // 100]), ("tail", order[N // 100 :])):
        found = quality.cosines[name]
        assert found.num_ids == len(rows)
        for percentile in (1, 5, 25, 50, 95):
            expected = np.percentile(cosine_N[rows], percentile)
            assert found.percentiles[f"p{percentile}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("chunk", [1 << 22, 9000])
@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_recall_is_by_brute_force(monkeypatch: pytest.MonkeyPatch, similarity: str, chunk: int) -> None:
    """The neighbours are the most similar other ids, whatever the block size; recall is the share that stays."""
    monkeypatch.setattr("embstore.fitting.checks.CHUNK_ELEMENTS", chunk)
    approx_ND = (VECTORS + 0.3 * RANDOM.normal(size=VECTORS.shape)).astype(np.float32)
    neighbours = list[Any]()
    for table_ND in (VECTORS, approx_ND):
        other_ND = table_ND / np.linalg.norm(table_ND, axis=1, keepdims=True) if similarity == "cosine" else table_ND
        scores_NN = table_ND.astype(float) @ other_ND.T.astype(float)
        np.fill_diagonal(scores_NN, -np.inf)
        neighbours.append(np.argsort(-scores_NN, axis=1)[:, :10])
        found_QK = nearest_neighbours(table_ND, np.arange(N), 10, similarity)
        np.testing.assert_array_equal(np.sort(found_QK), np.sort(neighbours[-1]))
    shares = [len({*before} & {*after}) / 10 for before, after in zip(*neighbours, strict=True)]
    recall = measure(VECTORS, lookup_of(approx_ND)).quality.recall
    assert recall is not None
    assert (recall.neighbours, recall.num_queries) == (10, N)
    assert getattr(recall, similarity) == pytest.approx(np.mean(shares))


def test_queries_are_a_sample_of_a_large_table() -> None:
    """At most a thousand."""
    vectors_ND = RANDOM.normal(size=(1500, 3)).astype(np.float32)
    recall = measure(vectors_ND, lookup_of(vectors_ND)).quality.recall
    assert recall is not None
    assert (recall.num_queries, recall.cosine) == (1000, 1)


def test_vectors_of_zeros_have_no_direction() -> None:
    """They are left out; what became zeros counts as 0; figures that do not exist are None."""
    x_ND = np.array([[0, 0], [1, 0], [1, 1]], np.float32)
    found = measure(x_ND, lookup_of(np.array([[1, 0], [0, 0], [2, 2]], np.float32))).quality.cosines["all"]
    assert (found.num_ids, found.percentiles["p50"]) == (2, pytest.approx(0.5))
    nothing = measure(np.zeros((1, 2), np.float32), lookup_of(np.ones((1, 2), np.float32)), counts_N=np.ones(1)).quality
    assert (nothing.relative_error, nothing.recall, nothing.error_by_popularity) == (None, None, [None])
    assert [(group.num_ids, group.percentiles) for group in nothing.cosines.values()] == [(0, {})] * 3


# ---- the command -----------------------------------------------------------------------------------------------------


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
    """No work is lost."""
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
    """Both lengths, for people and for programs, when the label moves from the one to the other."""
    np.save(tmp_path / "short.npy", VECTORS[:, :8])
    store = open_store(tmp_path / "store")
    store.publish("item", VECTORS)
    line = [tmp_path / "short.npy", "--scheme", "hash", "--ratio", 4, "--table", "item", "--store", store.root]
    assert json.loads(cli_run(*line, "--json", "--no-promote")[1])["embedding_dim_before"] is None
    code, out, _ = cli_run(*line)
    assert code == 0
    assert "published item version 3, label latest moved to it, embedding_dim 16 -> 8\n" in out
    assert json.loads(cli_run(*line, "--json")[1])["embedding_dim_before"] == 8


def test_it_says_where_the_page_is(cli_run: Any, vectors: Path, tmp_path: Path) -> None:
    """The last line beside the tables names the file."""
    path = tmp_path / "r.html"
    code, out, err = cli_run(vectors, "--scheme", "hash", "--ratio", 4, "--html", path)
    assert code == 0
    assert err.endswith(f"s  report written to {path}\n")
    assert "bytes for ids" in out


# ---- the page --------------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Follows a page: tags that stay open, attributes, text."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Opened, unless it is void."""
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """Opened and closed."""
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        """Closes what was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """What is read."""
        self.text += data


def test_the_page_holds_the_figures_and_loads_nothing(vectors: Path, counts: Path, tmp_path: Path) -> None:
    """Well-formed HTML with three plots as SVG, a table for each, no address and no script."""
    path = tmp_path / "report.html"
    job = Job(vectors=vectors, scheme="memcom", ratio=4, counts=counts, table="a<b&c".replace("<b&", "-"), html=path)
    result = compress(job, store=open_store(tmp_path / "store"))
    page = path.read_text("utf-8")
    seen = Balanced(page)
    assert seen.open == []
    assert seen.tags.count("svg") == 3
    assert seen.tags.count("table") == 4
    assert "script" not in seen.tags
    assert len(seen.ids) == len(set(seen.ids))
    assert not re.search(r"https?:|//|<link|@import|src=", page)
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert references <= set(seen.ids)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "var(--" in svg
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]", svg)
    quality = result.quality
    assert quality.error_by_popularity is not None
    assert quality.recall is not None
    figures = [quality.relative_error, quality.relative_error_unweighted, *quality.error_by_popularity]
    figures += [quality.recall.cosine, quality.recall.inner_product]
    figures += [p for group in quality.cosines.values() for p in group.percentiles.values()]
    for figure in figures:
        assert f"{figure:.4f}" in seen.text
    assert f"{result.num_bytes:,} of {result.budget_bytes:,} allowed" in seen.text
    assert "a-c version 1, label latest" in seen.text


def test_the_page_of_odd_tables(tmp_path: Path) -> None:
    """No counts, a single id, nothing but zeros; names are text and never tags."""
    for name, vectors_ND in (("<b>&.npy", np.zeros((3, 4))), ("one.npy", np.ones((1, 2)))):
        np.save(tmp_path / name, vectors_ND)
        path = tmp_path / "r.html"
        compress(Job(vectors=tmp_path / name, scheme="full", ratio=1, html=path))
        seen = Balanced(path.read_text("utf-8"))
        assert seen.open == []
        assert f"{Path(name).stem}: full, 1.0 times smaller" in seen.text
        assert "b" not in seen.tags


def test_a_page_needs_the_plot_library(vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the message says what to install, before anything is fitted."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'embstore\[report\]'"):
        compress(Job(vectors=vectors, scheme="full", ratio=1, html=tmp_path / "r.html"))


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
