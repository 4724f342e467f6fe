"""Figures as people read them: three digits and a unit."""

from __future__ import annotations

NS = {"us": 1e3, "ms": 1e6, "s": 1e9}
"""Nanoseconds in a unit of time."""
_BYTES = ("B", "kB", "MB", "GB", "TB")


def time_text(ns: float) -> str:
    """`832 us`, `1.24 ms`, `2.10 s`; `0` for nothing."""
    if ns <= 0:
        return "0"
    for unit, size in NS.items():
        if ns < 999.5 * size or unit == "s":
            return f"{digits(ns / size)} {unit}"
    raise AssertionError("seconds take everything")


def digits(value: float) -> str:
    """Three digits that count, no exponent: `0.0123`, `1.24`, `83.2`, `1,240`."""
    size = abs(value)
    for limit, places in ((0.00995, 4), (0.0995, 4), (0.995, 3), (9.995, 2), (99.95, 1)):
        if size < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"


def plain_text(value: float) -> str:
    """A round number, without the zeros that say nothing: `0`, `0.5`, `1,500`."""
    text = digits(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def rate_text(value: float) -> str:
    """A number a second: `1,234/s`, `12.3/s`."""
    return f"{value:,.0f}/s" if value >= 100 or value == 0 else f"{value:.3g}/s"


def share_text(value: float) -> str:
    """A share as percent; never `0 %` of something that is there, never `100 %` of less than everything."""
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    if value < 0.0001:
        return "<0.01 %"
    text = f"{100 * value:.1f}" if value >= 0.01 else f"{100 * value:.2f}"
    return ">99.9 %" if text == "100.0" else f"{text} %"


def bytes_text(value: float) -> str:
    """`512 B`, `1.24 MB`."""
    for unit in _BYTES[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{digits(value)} {_BYTES[-1]}"


def seconds_text(value: float) -> str:
    """A moment or a length of a run: `7 s`, `2.5 s`, `3:20`, `1:00:00`."""
    if abs(value) < 120:
        return f"{value:.1f}".removesuffix(".0") + " s"
    return clock_text(value)


def clock_text(value: float) -> str:
    """Seconds as a clock shows them: `0:00`, `3:20`, `1:00:00`."""
    sign, whole = "-" if value < 0 else "", round(abs(value))
    hours, minutes, seconds = whole // 3600, whole // 60 % 60, whole % 60
    return f"{sign}{hours}:{minutes:02}:{seconds:02}" if hours else f"{sign}{minutes}:{seconds:02}"
