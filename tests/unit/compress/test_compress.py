"""`embstore compress`: what it takes, what it makes of it, what it reports, and what it refuses."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import torch
from support.compressing import COUNTS, KEYS, VECTORS, D, N

from embstore import fitting, open_store
from embstore.compress import run as compress_run
from embstore.compress.fit import fit_within
from embstore.compress.inputs import Source
from embstore.compress.page import write_page
from embstore.compress.result import Job
from embstore.compress.run import compress
from embstore.errors import ConfigError
from embstore.schemes import SCHEMES, scheme_class

pytestmark = pytest.mark.slow

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
    """The fit uses its budget so far that one more shared row would not fit."""
    for budget in (1000, 5000, 12345):
        module = fit_within(scheme_class("hash"), torch.from_numpy(VECTORS), budget, dtype=dtype)
        row = {"float32": 64, "float16": 32, "bfloat16": 32, "int8": 24, "int4": 12}[dtype]
        assert module.num_bytes(dtype) == min(budget // row, N) * row


def test_a_full_table_of_int8_fits_where_float32_would_not() -> None:
    """A full table of int8 rows fits a budget that its float32 rows would not."""
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
    assert isinstance(numbered.ids, np.ndarray)
    assert numbered.ids.tolist() == [3, 1, 0, 2]
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


def test_it_says_where_the_page_is(cli_run: Any, vectors: Path, tmp_path: Path) -> None:
    """The last line beside the tables names the file of the page."""
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
    job = Job(vectors=vectors, scheme="memcom", ratio=4, counts=counts, table="a-c")
    result = compress(job, store=open_store(tmp_path / "store"))
    write_page(path, result)
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
        assert re.search(r'class="[a-z ]+ c\d', svg)
        assert not re.search(r"#[0-9a-f]{3}", svg)
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
        write_page(path, compress(Job(vectors=tmp_path / name, scheme="full", ratio=1)))
        seen = Balanced(path.read_text("utf-8"))
        assert seen.open == []
        assert f"{Path(name).stem}: full, 1.0 times smaller" in seen.text
        assert "b" not in seen.tags
