"""Bags of ids that must be refused, in Python and over HTTP in the same words."""

from __future__ import annotations

from typing import Any

from embstore.errors import ConfigError, DataError

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pooling alone": (
        {"pooling": "mean"},
        ConfigError,
        "pooling 'mean' without offsets: give offsets, the place where each bag starts; [0] is one bag",
    ),
    "weights alone": (
        {"weights": [1, 1, 1]},
        ConfigError,
        "weights without offsets: give offsets, the place where each bag starts; [0] is one bag",
    ),
    "offsets alone": (
        {"offsets": [0]},
        ConfigError,
        "offsets without pooling: give pooling, one of sum, mean, max",
    ),
    "unknown pooling": (
        {"offsets": [0], "pooling": "median"},
        ConfigError,
        "pooling must be one of sum, mean, max, got 'median'",
    ),
    "weights of a maximum": (
        {"offsets": [0], "pooling": "max", "weights": [1, 1, 1]},
        ConfigError,
        "pooling 'max' takes no weights: leave them out, or pool by sum or mean",
    ),
    "no start": (
        {"offsets": [1, 2], "pooling": "sum"},
        DataError,
        "offsets[0] is 1: it must be 0, where the first bag starts",
    ),
    "negative": (
        {"offsets": [-1], "pooling": "sum"},
        DataError,
        "offsets[0] is -1: it must be 0, where the first bag starts",
    ),
    "decreasing": (
        {"offsets": [0, 2, 1], "pooling": "sum"},
        DataError,
        "offsets[2] is 1, less than 2 before it: bags are in order",
    ),
    "past the end": (
        {"offsets": [0, 3, 4, 5], "pooling": "sum"},
        DataError,
        "offsets[2] is 4, past the end of 3 ids: at most 3 is right",
    ),
    "no bags": (
        {"offsets": [], "pooling": "sum"},
        DataError,
        "offsets is empty, but there are 3 ids: the first bag starts at 0",
    ),
    "few weights": (
        {"offsets": [0], "pooling": "sum", "weights": [1, 1]},
        DataError,
        "weights has 2 numbers for 3 ids: give one for each id",
    ),
    "past float32": (
        {"offsets": [0], "pooling": "sum", "weights": [1, 1e39, 1]},
        DataError,
        "weights[1] is 1e+39: a weight is a finite float32 number",
    ),
    "negative mean": (
        {"offsets": [0], "pooling": "mean", "weights": [1, 1, -0.5]},
        DataError,
        "weights[2] is -0.5: a mean takes weights of 0 and above, a sum takes any",
    ),
    "large weights": (
        {"offsets": [0, 1], "pooling": "mean", "weights": [1, 3e38, 3e38]},
        DataError,
        "bag 1: its weights add up to 6e+38, which does not fit float32",
    ),
    "a large sum": (
        {"offsets": [0, 0], "pooling": "sum", "weights": [3e38, 3e38, 3e38]},
        DataError,
        "bag 1: its sum does not fit float32",
    ),
}
"""What a caller may get wrong with the ids [5, 4, 5], and what it is told: the library's words are the server's too."""
