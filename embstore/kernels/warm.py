"""Compile what every server runs whatever its tables: `python -m embstore.kernels.warm`, when an image is built.

The loops of a table's scheme are compiled when the table is loaded.
"""

from __future__ import annotations

from importlib import import_module

ALWAYS = ("ids", "pooling", "hot", "wire", "decimal")
"""Range checks and vocabularies, bags, the row cache, the encodings of replies."""


def warm() -> None:
    """Compile now, not in the first request: each of these files compiles its loops when it is imported."""
    for name in ALWAYS:
        import_module(f"embstore.kernels.cpu.{name}")


if __name__ == "__main__":
    warm()
