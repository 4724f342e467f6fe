"""Sizes as people write them."""

from __future__ import annotations

import pytest

from embstore.common.sizes import parse_bytes
from embstore.errors import ConfigError


def test_a_size_is_bytes_or_a_number_with_a_unit() -> None:
    """`parse_bytes` takes a number of bytes, and decimal and binary units in any case."""
    assert [parse_bytes(text) for text in (12, "4MB", "512 KiB", "1.5kb")] == [12, 4_000_000, 524_288, 1500]


@pytest.mark.parametrize("text", ["", "4 apples", "-1", "0", "MB", 0])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    """The error shows what was given and what a size looks like."""
    with pytest.raises(ConfigError, match="4MB"):
        parse_bytes(text)
