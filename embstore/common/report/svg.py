"""Plots as inline SVG without a script: colours and light or dark are the page's, hovering shows the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from embstore.common.report.axes import Scale

WIDTH, LEFT, RIGHT, BOTTOM, ROW = 960, 74, 88, 44, 17
MAX_ROWS = 4
_CHAR = 6.4
"""About how wide a letter is."""


@dataclass(frozen=True, kw_only=True)
class Polyline:
    """A curve through points in order; where a value is None it has a gap. color: its number in the style sheet."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One part of a stack: a value for each of the stack's cells."""

    name: str
    values: Sequence[float]
    color: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """A moment with a name, or a span of `seconds`."""

    at: float
    name: str
    seconds: float = 0.0
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a plot has around its curves.

    name: what it shows, for those who cannot see it. bands: phases: name, begin, end. hover: from, to, text.
    """

    name: str
    x: Scale
    y: Scale
    bands: Sequence[tuple[str, float, float]] = ()
    events: Sequence[Event] = ()
    hover: Sequence[tuple[float, float, str]] = ()
    width: int = WIDTH
    height: int = 240

    def across(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + self.x.at(value) * (self.width - LEFT - RIGHT)

    def up(self, value: float) -> float:
        """Pixels from the top of the curves' area."""
        return (1 - self.y.at(value)) * self.height


def line_plot(frame: Frame, lines: Iterable[Polyline]) -> str:
    """Curves, each with its name at its right end."""
    drawn, ends = [], []
    for line in lines:
        style = f"line c{line.color}" + " dashed" * line.dashed + " thin" * line.thin
        for piece in _pieces(frame, line.points):
            if len(piece) == 1:
                drawn.append(f'<circle class="dot c{line.color}" cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="2"/>')
            else:
                drawn.append(f'<path class="{style}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in piece)}"/>')
        known = [value for _, value in line.points if value is not None]
        if known:
            ends.append((frame.up(known[-1]), line.name, line.color))
    return _around(frame, drawn + _tags(frame, ends))


def stacked_plot(frame: Frame, cells: Sequence[tuple[float, float]], layers: Sequence[Layer]) -> str:
    """For each cell (from, to) the layers on top of each other, the first at the bottom."""
    drawn, below = [], [0.0] * len(cells)
    for layer in layers:
        path = []
        for n, ((begin, end), value) in enumerate(zip(cells, layer.values, strict=True)):
            if value > 0:
                left, right = frame.across(begin), frame.across(end)
                bottom, top = frame.up(below[n]), frame.up(below[n] + value)
                path.append(f"M{left:.1f} {bottom:.1f}V{top:.1f}H{right:.1f}V{bottom:.1f}Z")
                below[n] += value
        drawn.append(f'<path class="area c{layer.color}" d="{"".join(path)}"/>')
    return _around(frame, drawn)


def bar_plot(frame: Frame, bars: Sequence[tuple[float, str]], color: int) -> str:
    """A bar for each value with its text above it, the n-th around n; see `axes.of_names`."""
    drawn = []
    for n, (value, text) in enumerate(bars):
        left, right, top = frame.across(n - 0.35), frame.across(n + 0.35), frame.up(value)
        drawn.append(
            f'<rect class="area c{color}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{frame.height - top:.1f}"/>'
            f'<text x="{(left + right) / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle">{escape(text)}</text>'
        )
    return _around(frame, drawn)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot with its heading, a line that says how to read it, and names of its colours: name, colour, dashed."""

    title: str
    note: str
    svg: str
    legend: Sequence[tuple[str, int, bool]] = ()
    half: bool = False


def span_plot(frame: Frame, rows: Sequence[tuple[str, float, float, int, str]]) -> str:
    """A bar for each row: name, from, to, color, what hovering shows. The height is theirs, not the frame's."""
    drawn = []
    for n, (name, begin, end, color, told) in enumerate(rows):
        left, top = frame.across(begin), n * 20 + 4
        width = max(2.0, frame.across(end) - left)
        drawn.append(
            f'<rect class="area c{color}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="12" rx="2">'
            f"<title>{escape(told)}</title></rect>"
            f'<text class="tag c{color}" x="{frame.width - RIGHT + 6}" y="{top + 10}">{_cut(name, RIGHT - 6)}</text>'
        )
    return _around(frame, drawn)


def _around(frame: Frame, drawn: Sequence[str]) -> str:
    """The whole picture: phases behind, curves, events, and what hovering finds on top."""
    right, height = frame.width - RIGHT, frame.height
    events, rows = _events(frame)
    top = ROW * (rows + bool(frame.bands)) + 8
    parts = [
        f'<svg class="plot" viewBox="0 0 {frame.width} {top + height + BOTTOM}" role="img" ',
        f'aria-label="{escape(frame.name)}">',
        f'<g transform="translate(0 {top})">',
        *_bands(frame),
    ]
    for tick in frame.y.ticks:
        y = frame.up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(frame.y.text(tick))}</text>')
    for tick in frame.x.ticks:
        x = frame.across(tick)
        parts.append(f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{height}" y2="{height + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height + 18}" text-anchor="middle">{escape(frame.x.text(tick))}</text>')
    middle = (LEFT + right) / 2
    parts += [
        f'<line class="base" x1="{LEFT}" x2="{right}" y1="{height}" y2="{height}"/>',
        f'<text class="axis" x="{middle}" y="{height + 36}" text-anchor="middle">{escape(frame.x.label)}</text>',
        f'<text class="axis" transform="translate(13 {height / 2}) rotate(-90)" text-anchor="middle">',
        f"{escape(frame.y.label)}</text>",
        *drawn,
        *events,
    ]
    for begin, end, text in frame.hover:
        x, until = frame.across(begin), frame.across(end)
        parts.append(
            f'<rect class="hit" x="{x:.1f}" y="0" width="{until - x:.1f}" height="{height}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return "".join(parts) + "</g></svg>"


def _bands(frame: Frame) -> list[str]:
    """Phases: every second one shaded, and their names above where there is room."""
    found = []
    for n, (name, begin, end) in enumerate(frame.bands):
        x, until = frame.across(begin), frame.across(end)
        if n % 2:
            found.append(
                f'<rect class="band" x="{x:.1f}" y="{-ROW}" width="{until - x:.1f}" height="{frame.height + ROW}"/>'
            )
        if (until - x) > 3 * _CHAR:
            found.append(f'<text x="{x + 4:.1f}" y="-5">{_cut(name, until - x - 6)}</text>')
    return found


def _events(frame: Frame) -> tuple[list[str], int]:
    """Events, and how many rows their names take above the plot: no two lie on each other, some may have no room."""
    found: list[str] = []
    begins: list[float] = []
    base = -ROW if frame.bands else 0
    for event in sorted(frame.events, key=lambda event: event.at, reverse=True):  # a line meets no name of a later one
        x, name = frame.across(event.at), _cut(event.name, frame.width - frame.across(event.at) - 4)
        end = x + len(event.name) * _CHAR + 10
        row = next((n for n, begin in enumerate(begins) if end <= begin), len(begins))
        if row == MAX_ROWS:
            row, name = 0, ""
        else:
            begins[row : row + 1] = [x]
        y, style = base - row * ROW, " failed" * event.failed
        if event.seconds:
            wide = max(1.0, frame.across(event.at + event.seconds) - x)
            found.append(f'<rect class="span" x="{x:.1f}" y="0" width="{wide:.1f}" height="{frame.height}"/>')
        found.append(
            f'<line class="event{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - ROW + 4}" y2="{frame.height}"/>'
            f'<text class="name{style}" x="{x + 4:.1f}" y="{y - 5}">{name}</text>'
        )
    return found, len(begins)


def _pieces(frame: Frame, points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The parts of a curve between its gaps, in pixels; points beside the axis are left out."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, value in points:
        if value is None:
            found.append([])
        elif frame.x.low <= x <= frame.x.high:
            found[-1].append((frame.across(x), frame.up(value)))
    return [piece for piece in found if piece]


def _tags(frame: Frame, ends: Sequence[tuple[float, str, int]]) -> list[str]:
    """Names beside the ends of curves, pushed apart so that each can be read."""
    placed, found = -9.0, []
    lowest = frame.height - 13 * (len(ends) - 1)
    for n, (y, name, color) in enumerate(sorted(ends)):
        placed = min(max(y, placed + 13), lowest + 13 * n)
        x = frame.width - RIGHT + 6
        found.append(f'<text class="tag c{color}" x="{x}" y="{placed + 4:.1f}">{_cut(name, RIGHT - 6)}</text>')
    return found


def _cut(text: str, pixels: float) -> str:
    room = max(1, int(pixels / _CHAR))
    return escape(text if len(text) <= room else text[: room - 1] + "…")
