"""Sizes as people write them."""

from __future__ import annotations

import re

from embstore.errors import ConfigError

_UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(text: int | str) -> int:
    """Bytes as a number (4000000) or with a unit ("4MB", "512 KiB"); ConfigError otherwise."""
    if isinstance(text, int):
        text = str(text)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or factor is None or not (num_bytes := int(float(match[1]) * factor)):
        raise ConfigError(f"budget must be bytes above 0, as 4000000, '4MB' or '512KiB', got {text!r}")
    return num_bytes
