"""The plots of a report as inline SVG: text stays text, and colours are the page's, so it may be light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ConfigError

# Colours that are drawn with, and what the page calls them.
INK, FAINT, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
_CSS = {INK: "var(--ink)", FAINT: "var(--faint)", FIRST: "var(--first)", SECOND: "var(--second)"}
_SIZE = (7.0, 3.2)
_NUM_POINTS = 401


def check_plots() -> None:
    """ConfigError unless plots can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"an HTML report needs {error.name}: pip install 'embstore[report]'") from error


def distribution(name: str, groups: Mapping[str, NDArray[Any]], label: str) -> str:
    """For each group, the share of its values that are at most so large."""
    shares = np.linspace(0, 1, _NUM_POINTS)
    with _style(name):
        figure, axes = _figure(label, "share of the ids, cumulated")
        for (title, values), color, line in zip(groups.items(), (FIRST, SECOND), ("-", "--"), strict=False):
            axes.plot(np.quantile(values, shares), shares, color=color, linestyle=line, linewidth=1.6, label=title)
        axes.set_ylim(0, 1)
        if len(groups) > 1:
            axes.legend(frameon=False, loc="upper left", labelcolor=INK)
        return _svg(figure, name)


def bars(name: str, values: Sequence[float], titles: Sequence[str], labels: tuple[str, str], top: float | None) -> str:
    """One bar per value, with the value above it."""
    with _style(name):
        figure, axes = _figure(*labels)
        drawn = axes.bar(range(len(values)), values, color=FIRST, width=0.7, tick_label=list(titles))
        axes.bar_label(drawn, labels=[f"{value:.3g}" for value in values], color=INK, padding=2, fontsize=9)
        axes.set_ylim(0, top or 1.15 * max(*values, 1e-9))
        return _svg(figure, name)


def _style(name: str) -> AbstractContextManager[None]:
    from matplotlib import rc_context

    settings: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK
    )
    return rc_context(settings | {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"})


def _figure(across: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure as an element of a page: no prologue, no metadata, no namespaces, ids of its own, hidden from readers.

    The page says in words and in a table what it shows.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = svg.replace(' id="', f' id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg.strip()
