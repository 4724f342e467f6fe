"""Numbers as JSON: what is written reads back as the same number, and no fewer digits would."""

from __future__ import annotations

import json
import re

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore import wire
from embstore.kernels.cpu.decimal import AT_ONCE, MOST_BYTES, put_numbers

Floats = NDArray[np.float32]


def floats(bits: NDArray[np.unsignedinteger]) -> Floats:
    """The float32 numbers with these bits."""
    return bits.astype(np.uint32).view(np.float32)


def digits_of(text: str) -> tuple[str, int]:
    """The significant digits of a number, and the exponent of its last one."""
    number, _, exponent = text.lstrip("-").partition("e")
    whole, _, fraction = number.partition(".")
    digits = (whole + fraction).lstrip("0")
    return digits.rstrip("0"), int(exponent or 0) - len(fraction) + len(digits) - len(digits.rstrip("0"))


def check(numbers: Floats) -> None:
    """Read back equal, and in the digits that orjson finds: the fewest, and of those the nearest."""
    text = bytes(wire.json_rows(numbers.reshape(1, -1), flat=True))
    theirs = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)
    if text != theirs:  # another notation would do
        for own, other in zip(text[1:-1].split(b","), theirs[1:-1].split(b","), strict=True):
            assert digits_of(own.decode()) == digits_of(other.decode())
    read = np.array([np.nan if number is None else number for number in json.loads(text)], np.float32)
    finite = np.isfinite(numbers)
    assert (read.view(np.uint32) == numbers.view(np.uint32))[finite].all()
    assert np.isnan(read[~finite]).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_any_number_reads_back(bits: list[int]) -> None:
    """Every pattern of 32 bits: numbers, subnormals, zeros, and null for what is none."""
    check(floats(np.array(bits)))


@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_numbers_of_every_size(sign: int) -> None:
    """All exponents, with the least, the largest and some other fractions: where neighbours are not equally far."""
    fractions = np.r_[0, 1, 2, 3, (1 << 22) - 1, 1 << 22, (1 << 23) - 2, (1 << 23) - 1]
    fractions = np.r_[fractions, np.random.default_rng(0).integers(0, 1 << 23, 500)]
    check(floats(((np.arange(256)[:, None] << 23) | fractions | sign).reshape(-1)))


def test_numbers_of_few_digits() -> None:
    """What people write, with every place of the point: as short as they wrote it."""
    few = np.r_[np.arange(1, 1000), 1_000_000, 9_999_999, 10_000_000, 16_777_216]
    check((few[:, None] * 10.0 ** np.arange(-46, 30)).astype(np.float32).reshape(-1))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_digits_are_the_fewest(number: float) -> None:
    """As many as numpy says are needed, which finds them another way."""
    wanted = np.format_float_scientific(np.float32(number), unique=True, trim="-")
    text = bytes(wire.json_rows(np.array([[number]], np.float32), flat=True)).decode()
    assert digits_of(text[1:-1]) == digits_of(wanted) or number == 0


def test_what_it_looks_like() -> None:
    """JSON numbers with a point or an exponent: no reader takes them for integers."""
    numbers = np.array(
        [[0, -0.0, 1, -1.5, 0.1, 1e-6, 1.5e-7], [16777216, 1e12, 1e20, np.nan, np.inf, 1e-45, 3.4028235e38]]
    )
    text = wire.json_rows(numbers.astype(np.float32))
    assert text == (
        b"[[0.0,-0.0,1.0,-1.5,0.1,0.000001,1.5e-7],[16777216.0,1000000000000.0,1e+20,null,null,1e-45,3.4028235e+38]]"
    )
    assert not re.search(rb"[\[,]-?\d+[,\]]", text)


@pytest.mark.parametrize("num_rows", [0, 1, 2, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
@pytest.mark.parametrize("width", [1, 3, AT_ONCE, AT_ONCE + 1])
@pytest.mark.parametrize("number", [-1.2345678e-6, -1.2345678e-38, 0.0, np.nan, -16777216.0, 1.5])
def test_nothing_is_written_beyond_the_room(num_rows: int, width: int, number: float) -> None:
    """Over the ends of blocks, with the longest numbers and the shortest: the room that is promised is enough."""
    bits = np.full(num_rows * width, number, np.float32).view(np.uint32)
    for columns, room in ((width, MOST_BYTES * len(bits) + 2 * num_rows + 2), (0, MOST_BYTES * len(bits) + 2)):
        memory = np.full(room + 200, 0xA5, np.uint8)
        length = put_numbers(bits, columns, memory[100 : 100 + room])
        assert length <= room
        assert (memory[:100] == 0xA5).all()
        assert (memory[100 + room :] == 0xA5).all()


@pytest.mark.parametrize("num_rows", [0, 1, 2, AT_ONCE + 1])
@pytest.mark.parametrize("width", [1, 3, AT_ONCE])
def test_rows_and_flat_lists(num_rows: int, width: int) -> None:
    """The same numbers in the shape that was asked for, whatever their layout in memory."""
    numbers = np.random.default_rng(0).standard_normal((num_rows, width), np.float32)
    nested, flat = (json.loads(bytes(wire.json_rows(numbers, flat=flat))) for flat in (False, True))
    assert [len(row) for row in nested] == [width] * num_rows
    assert [number for row in nested for number in row] == flat
    assert np.array_equal(np.array(flat, np.float32), numbers.reshape(-1))
    for other in (np.asfortranarray(numbers), numbers.astype(">f4"), np.repeat(numbers, 2, axis=1)[:, ::2]):
        assert wire.json_rows(other) == wire.json_rows(numbers)
