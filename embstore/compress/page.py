"""The report as one HTML file: figures in words, tables and plots; it loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from embstore.common.atomic_files import storing
from embstore.compress import plots
from embstore.compress.measure import HOT_SHARE, Measured
from embstore.errors import ConfigError

if TYPE_CHECKING:
    from embstore.compress.run import Result

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --paper: #ffffff; --faint: #d7dbe0; --first: #0b62c4; --second: #b34700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #15181c; --faint: #3a4048; --first: #6db3ff; --second: #ffa657 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
figure { margin: 1rem 0 } svg { width: 100%; height: auto } figcaption { font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; min-width: 18rem;
  font-variant-numeric: tabular-nums }
caption { text-align: left; font-size: .9rem; padding-bottom: .3rem }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--faint); text-align: right }
th[scope=row], thead th:first-child { text-align: left; font-weight: 600 }
"""


def check_page(path: Path) -> None:
    """ConfigError unless a page can be drawn and its folder exists."""
    plots.check_plots()
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--html {path}: {'it is a folder' if path.is_dir() else f'no folder {path.parent}'}")


def write_page(path: Path, result: Result, measured: Measured) -> None:
    """Write the page of a result."""
    text = page(result, measured)
    with storing(f"writing {path}"):
        path.write_text(text, "utf-8")


def page(result: Result, measured: Measured) -> str:
    """The whole page."""
    name = result.table or Path(result.vectors).stem
    title = f"{name}: {result.scheme}, {result.ratio:.1f} times smaller"
    sections = (_sizes(result), _cosines(measured), _popularity(measured), _recall(measured))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _sizes(result: Result) -> str:
    quality = result.quality
    rows = [
        ("vectors", f"{result.num_embeddings:,} of {result.embedding_dim} dimensions"),
        ("scheme", f"{result.scheme}, {result.dtype} rows"),
        *((name, shorten(str(value), 80)) for name, value in result.parameters.items()),
        ("bytes", f"{result.num_bytes:,} of {result.budget_bytes:,} allowed"),
        ("bytes as float32", f"{result.full_bytes:,}"),
        ("ratio", f"{result.ratio:.2f}"),
        ("bytes of the ids", f"{result.id_space_bytes:,}"),
        ("relative error, weighted by count", number(quality.relative_error)),
        ("relative error, every id alike", number(quality.relative_error_unweighted)),
    ]
    if result.version is not None:
        label = f", label {result.label}" if result.label else ""
        rows.append(("published", f"{result.table} version {result.version}{label}"))
    caption = "Relative error is the root of the squared error over the squared length: 0 is exact, 1 is lost."
    return _table(caption, ("what", "value"), rows)


def _cosines(measured: Measured) -> str:
    groups = measured.quality.cosines
    there = ~np.isnan(measured.cosine_N)
    if not there.any():
        return "<h2>Directions</h2>\n<p>All vectors are zeros: they have none.</p>\n"
    if measured.hot_N is None:
        shown = {"all": measured.cosine_N[there]}
    else:
        shown = {"hot": measured.cosine_N[there & measured.hot_N], "tail": measured.cosine_N[there & ~measured.hot_N]}
        shown = {name: values for name, values in shown.items() if len(values)}
    plot = plots.distribution("cosine", shown, "cosine between the vector before and after")
    names = list(next(group.percentiles for group in groups.values() if group.percentiles))
    rows = [
        (name, f"{group.num_ids:,}", *(number(group.percentiles.get(p)) for p in names))
        for name, group in groups.items()
    ]
    words = "How far directions turned: 1 is not at all."
    if measured.hot_N is not None:
        words += f" Hot ids are the {HOT_SHARE:.0%} with the highest counts, the tail is all others."
    table = _table("Percentiles of the cosine", ("ids", "number", *names), rows)
    return f"<h2>Directions</h2>\n{_plotted(plot, words)}{table}"


def _popularity(measured: Measured) -> str:
    errors = measured.quality.error_by_popularity
    if errors is None:
        return ""
    titles = [str(i + 1) for i in range(len(errors))]
    plot = plots.bars(
        "popularity", [error or 0.0 for error in errors], titles, ("tenth of the ids, by falling count", "error"), None
    )
    table = _table("Relative error by tenth", ("tenth", "error"), list(zip(titles, map(number, errors), strict=True)))
    return f"<h2>Error by popularity</h2>\n{_plotted(plot, 'The first tenth is asked for most.')}{table}"


def _recall(measured: Measured) -> str:
    found = measured.quality.recall
    if found is None:
        return ""
    values = {"cosine": found.cosine, "inner product": found.inner_product}
    plot = plots.bars("recall", list(values.values()), list(values), ("similarity", "recall"), 1.1)
    words = (
        f"The share of the {found.neighbours} nearest neighbours that stay among them, "
        f"over {found.num_queries:,} evenly drawn ids."
    )
    rows = [(name, number(value)) for name, value in values.items()]
    table = _table(f"Recall at {found.neighbours}", ("similarity", "recall"), rows)
    return f"<h2>Nearest neighbours</h2>\n{_plotted(plot, words)}{table}"


def _plotted(svg: str, words: str) -> str:
    return f"<figure>\n{svg}\n<figcaption>{escape(words)}</figcaption>\n</figure>\n"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>\n'
        for name, *values in rows
    )
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n"
    )


def number(value: float | None) -> str:
    """A figure with four digits behind the point."""
    return "none" if value is None else f"{value:.4f}"
