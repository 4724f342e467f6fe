"""The report as one HTML file: figures in words, tables and plots; it loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

from embstore.common.atomic_files import storing
from embstore.common.report.axes import between, from_zero, of_names, of_shares
from embstore.common.report.page import render
from embstore.common.report.svg import Chart, Frame, Polyline, bar_plot, line_plot
from embstore.compress.measure import HOT_SHARE, Measured, Quality, Recall
from embstore.compress.result import Result
from embstore.errors import ConfigError

HEIGHT, NUM_POINTS = 240, 401
BLUE, ORANGE = 0, 2
Row = tuple[str, ...]


def check_page(path: Path) -> None:
    """ConfigError unless a page can be written there."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--html {path}: {'it is a folder' if path.is_dir() else f'no folder {path.parent}'}")


def write_page(path: Path, result: Result) -> None:
    """Write the page of a result."""
    text = page(result)
    with storing(f"writing {path}"):
        path.write_text(text, "utf-8")


def page(result: Result) -> str:
    """The whole page."""
    quality = result.quality
    name = result.table or Path(result.vectors).stem
    return render(
        Path(__file__).with_name("page.html.j2"),
        title=f"{name}: {result.scheme}, {result.ratio:.1f} times smaller",
        sizes=_sizes(result),
        directions=_directions(result.measured),
        directions_heads=["ids", "number", *_percentile_names(quality)],
        directions_rows=_cosine_rows(quality),
        popularity=_popularity(quality.error_by_popularity),
        popularity_rows=[(str(n), number(error)) for n, error in enumerate(quality.error_by_popularity or (), 1)],
        recall=_recall(quality.recall),
        recall_rows=[] if quality.recall is None else [(name, number(v)) for name, v in _similarities(quality.recall)],
        neighbours=0 if quality.recall is None else quality.recall.neighbours,
    )


def _sizes(result: Result) -> list[Row]:
    quality = result.quality
    rows: list[Row] = [
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
    return rows


def _directions(measured: Measured) -> Chart | None:
    """The share of ids whose cosine is at most so large; None where no vector has a direction."""
    there_N = ~np.isnan(measured.cosine_N)
    if not there_N.any():
        return None
    groups = {"all": there_N}
    note = "How far directions turned: 1 is not at all."
    if measured.hot_N is not None:
        groups = {"hot": there_N & measured.hot_N, "tail": there_N & ~measured.hot_N}
        note += f" Hot ids are the {HOT_SHARE:.0%} with the highest counts, the tail is all others."
    shares = np.linspace(0, 1, NUM_POINTS)
    lines = []
    for (name, of_N), color in zip(groups.items(), (BLUE, ORANGE), strict=False):
        if of_N.any():
            points = list(zip(np.quantile(measured.cosine_N[of_N], shares).tolist(), shares.tolist(), strict=True))
            lines.append(Polyline(name=name, points=points, color=color, dashed=color == ORANGE))
    low, high = float(np.nanmin(measured.cosine_N)), float(np.nanmax(measured.cosine_N))
    x = between(low, high, "cosine between the vector before and after", lambda value: f"{value:.4g}")
    svg = line_plot(Frame(name="cosines, cumulated", x=x, y=of_shares("share of the ids"), height=HEIGHT), lines)
    return Chart(title="", note=note, svg=svg)


def _percentile_names(quality: Quality) -> list[str]:
    return list(next((group.percentiles for group in quality.cosines.values() if group.percentiles), ()))


def _cosine_rows(quality: Quality) -> list[Row]:
    names = _percentile_names(quality)
    return [
        (name, f"{group.num_ids:,}", *(number(group.percentiles.get(percentile)) for percentile in names))
        for name, group in quality.cosines.items()
    ]


def _popularity(errors: list[float | None] | None) -> Chart | None:
    if errors is None:
        return None
    names = [str(n) for n in range(1, len(errors) + 1)]
    svg = _bars(names, [error or 0.0 for error in errors], ("tenth of the ids, by falling count", "error"))
    return Chart(title="", note="The first tenth is looked up most.", svg=svg)


def _recall(found: Recall | None) -> Chart | None:
    if found is None:
        return None
    note = (
        f"The share of the {found.neighbours} nearest neighbours that stay among them, "
        f"over {found.num_queries:,} evenly drawn ids."
    )
    names, values = zip(*_similarities(found), strict=True)
    return Chart(title="", note=note, svg=_bars(names, values, ("similarity", "recall")))


def _similarities(found: Recall) -> list[tuple[str, float]]:
    return [("cosine", found.cosine), ("inner product", found.inner_product)]


def _bars(names: Sequence[str], values: Sequence[float], labels: tuple[str, str]) -> str:
    across, up = labels
    y = from_zero([1.1 * value for value in values], up, lambda value: f"{value:.3g}")
    frame = Frame(name=f"{up} by {across}", x=of_names(names, across), y=y, height=HEIGHT)
    return bar_plot(frame, [(value, f"{value:.3g}") for value in values], BLUE)


def number(value: float | None) -> str:
    """A figure with four digits behind the point."""
    return "none" if value is None else f"{value:.4f}"
