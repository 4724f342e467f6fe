"""What is compiled before any table is loaded."""

from __future__ import annotations

import sys

import pytest

from embstore.kernels.warm import ALWAYS, warm


@pytest.mark.parametrize("name", ALWAYS)
def test_warming_loads_every_loop_that_depends_on_no_table(name: str) -> None:
    """After `warm` the files whose loops compile when they are imported have been imported."""
    warm()
    assert f"embstore.kernels.cpu.{name}" in sys.modules


def test_warming_compiles_every_encoding() -> None:
    """After `warm` all encodings of replies are from compiled code."""
    warm()
    from embstore.kernels.cpu import decimal as cpu_decimal
    from embstore.kernels.cpu import wire as cpu_wire

    for loop in (cpu_wire.to_float16, cpu_wire.to_bfloat16, cpu_wire.to_int8, cpu_decimal.put_numbers):
        assert loop.nopython_signatures
