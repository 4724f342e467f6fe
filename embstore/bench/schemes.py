"""`embstore bench schemes`: every scheme trained on the same events at the same size, published, looked up, judged."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from embstore.bench.kernels import best_seconds
from embstore.common.progress import Silent
from embstore.errors import ConfigError
from embstore.publish.store import open_store
from embstore.schemes import SCHEMES
from embstore.schemes.base import Progress
from embstore.train.config import TableConfig, TrainConfig, load_config
from embstore.train.demo import write_demo
from embstore.train.run import train

LOOKUP_IDS = 1_000
HEADS = ("scheme", "bytes", "ratio", "nDCG", "of full", "1,000 ids, us", "training, s")
BEGIN, END = "<!-- made by `embstore bench schemes", "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one scheme costs and gives: bytes of both tables, their ratio, ndcg on the test events, lookup cost."""

    scheme: str
    num_bytes: int
    ratio: float
    ndcg: float
    of_full: float
    lookup_us: float
    train_seconds: float
    note: str = ""

    def cells(self) -> list[str]:
        """What is shown under HEADS."""
        if self.note:
            return [self.scheme, self.note, "", "", "", "", ""]
        numbers = [f"{self.num_bytes:,}", f"{self.ratio:g}", f"{self.ndcg:.4f}", f"{self.of_full:.0%}"]
        return [self.scheme, *numbers, f"{self.lookup_us:,.1f}", f"{self.train_seconds:.1f}"]


def measure(
    config: Path | None,
    *,
    ratio: float,
    names: Iterable[str] = (),
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """`full` first, then each scheme at `ratio`; a scheme that cannot get so small stands there with what it says."""
    wanted = ["full", *(name for name in (names or SCHEMES) if name != "full")]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="embstore-bench-") as folder:
        base = load_config(config or write_demo(Path(folder) / "demo"), overrides)
        for done, name in enumerate(wanted):
            if progress is not None:
                progress(name, done, len(wanted))
            table = TableConfig(scheme=name, ratio=None if name == "full" else ratio)
            settings = replace(base, tables=replace(base.tables, user=table, item=table))
            try:
                rows.append(_train(settings, Path(folder) / name, rows[0].ndcg if rows else None))
            except ConfigError as error:
                rows.append(_refused(name, str(error)))
    return rows


def _train(config: TrainConfig, folder: Path, full: float | None) -> Row:
    store = open_store(folder)
    with Silent() as report:
        result = train(config, store, report=report, device="cpu")
    ndcg = next(value for name, value in result.metrics.items() if name.startswith("ndcg"))
    sizes = list(result.tables.values())
    num_bytes = sum(table.num_bytes for table in sizes)
    plain = sum(4 * table.num_embeddings * table.embedding_dim for table in sizes)
    table = store.load("item", num_threads=1)
    keys = table.ids.ids_of(np.random.default_rng(0).integers(0, table.ids.num_ids, LOOKUP_IDS))
    ids = table.ids.rows(keys)[0]
    out = np.empty((LOOKUP_IDS, table.embedding_dim), np.float32)
    best = best_seconds({"lookup": lambda: table.scheme.lookup(table.config, table.tensors, ids, out)})
    return Row(
        scheme=config.tables.item.scheme,
        num_bytes=num_bytes,
        ratio=round(plain / num_bytes, 1),
        ndcg=round(ndcg, 4),
        of_full=round(ndcg / full, 3) if full else 1.0,
        lookup_us=round(best["lookup"] * 1e6, 1),
        train_seconds=round(result.seconds, 1),
    )


def _refused(name: str, why: str) -> Row:
    return Row(scheme=name, num_bytes=0, ratio=0, ndcg=0, of_full=0, lookup_us=0, train_seconds=0, note=why)


def check_markdown(path: Path, *, ratio: float, config: Path | None) -> tuple[str, str, str]:
    """What a file has before the table of this config and ratio, its marker, what comes after; ConfigError without."""
    name = f" {config}" if config else ""
    begin = f"{BEGIN}{name} --ratio {ratio:g}` -->"
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ConfigError(f"{path} has no lines {begin} and {END} to write between")
    return head, begin, tail


def write_markdown(
    path: Path, rows: list[Row], machine: Mapping[str, object], *, ratio: float, config: Path | None
) -> None:
    """Replace what stands between the markers of this config and ratio in a Markdown file; ConfigError without them."""
    head, begin, tail = check_markdown(path, ratio=ratio, config=config)
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "|".join(["---", *["---:"] * (len(HEADS) - 1)]) + "|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    about = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "load")
    body = "\n".join([*lines, "", f"Machine: {about}."])
    path.write_text(f"{head}{begin}\n{body}\n{END}{tail}", "utf-8")
