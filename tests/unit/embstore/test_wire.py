"""Encodings of replies: numpy's halves, torch's bfloat16, the store's int8 rows, byte for byte, or an error."""

# Shapes: B vectors, D embedding_dim.

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embstore import quantize
from embstore.errors import ConfigError, DataError
from embstore.wire import DTYPES, decode_rows, encode_rows, row_bytes

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
SHAPES = st.tuples(st.integers(0, 6), st.one_of(st.just(1), st.integers(1, 70)))


def rows(limit: float = float(np.finfo(np.float32).max)) -> st.SearchStrategy[Floats]:
    """Vectors of any finite numbers up to a limit: subnormals, both zeros and repeated numbers among them."""
    limit = float(np.float32(limit))
    numbers = st.one_of(
        st.floats(-limit, limit, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 2.0**-24, 2.0**-25, 1 + 2.0**-11, 1 + 2.0**-8]),
    )
    return SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=numbers))


def encoded(vectors_BD: Floats, dtype: str) -> NDArray[np.uint8]:
    """Encoded rows as bytes [B, row_bytes]."""
    data = encode_rows(vectors_BD, dtype)
    return np.frombuffer(data, np.uint8).reshape(len(vectors_BD), row_bytes(dtype, vectors_BD.shape[1]))


def same_zeros(rows_BP: NDArray[np.uint8], vectors_BD: Floats) -> NDArray[np.uint8]:
    """int8 rows in which a bias of -0.0 is 0.0 where both are the least: which of two zeros is less is an accident."""
    rows_BP = rows_BP.copy()
    least = vectors_BD.min(axis=1) == 0
    both = least & (np.signbit(vectors_BD) & (vectors_BD == 0)).any(axis=1)
    rows_BP[both, -4:] = 0
    return rows_BP


@given(rows(limit=65504))
def test_float16_is_numpys(vectors_BD: Floats) -> None:
    """The bits of `astype(float16)`: rounded to nearest even, subnormals and the sign of zero kept."""
    assert bytes(encode_rows(vectors_BD, "float16")) == vectors_BD.astype("<f2").tobytes()


def test_float16_rounds_at_every_half_as_numpy_does() -> None:
    """All finite halves, the points in the middle of two of them, and the floats beside those."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.append((halves[1:] + halves[:-1]) / 2, [np.float32(0)]).astype(np.float32)
    around = [np.nextafter(x, np.float32(to), dtype=np.float32) for x in (halves, middles) for to in (-np.inf, np.inf)]
    cases = np.concatenate([halves, middles, *around])
    cases = np.concatenate([cases, -cases])[:, None]
    assert bytes(encode_rows(cases, "float16")) == cases.astype("<f2").tobytes()


@given(rows(limit=3e38))
def test_bfloat16_is_torchs_and_the_stores(vectors_BD: Floats) -> None:
    """The bits that torch rounds to, and `quantize.pack`."""
    found = bytes(encode_rows(vectors_BD, "bfloat16"))
    assert found == torch.from_numpy(vectors_BD).bfloat16().view(torch.int16).numpy().tobytes()
    assert found == quantize.pack(vectors_BD, "bfloat16").tobytes()


def test_every_bfloat16_is_rounded_to_as_torch_does() -> None:
    """All upper halves that stay finite, with lower halves below, at and above the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    upper = upper[(upper & 0x7FFF) < 0x7F7F]
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    cases = (upper[:, None] << 16 | lower).view(np.float32)
    oracle = torch.from_numpy(cases).bfloat16().view(torch.int16).numpy()
    assert bytes(encode_rows(cases, "bfloat16")) == oracle.tobytes()


@given(rows(limit=1.7e38))
def test_int8_is_what_the_store_packs(vectors_BD: Floats) -> None:
    """Byte for byte `quantize.pack(vectors, "int8")`: constant rows, subnormal spans and huge ones too."""
    packed = quantize.pack(vectors_BD, "int8")
    assert (same_zeros(encoded(vectors_BD, "int8"), vectors_BD) == same_zeros(packed, vectors_BD)).all()


@given(hnp.arrays(np.uint32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.integers(0, 2**32 - 1)))
def test_any_bits_are_encoded_as_the_oracle_does_or_refused(bits_BD: NDArray[np.uint32]) -> None:
    """Whatever 32 bits a number has: finite oracle, same bytes; otherwise DataError, never an infinity or a NaN."""
    vectors_BD = bits_BD.view(np.float32)
    for dtype in ("float16", "bfloat16", "int8"):
        with np.errstate(all="ignore"):
            oracle = vectors_BD.astype("<f2") if dtype == "float16" else None
            if oracle is None and (dtype == "int8" or not np.isnan(vectors_BD).any()):
                oracle = quantize.pack(vectors_BD, dtype)
        usable = oracle is not None and not len(quantize.check_rows_finite(oracle, dtype))
        if usable and np.isfinite(vectors_BD).all():
            assert oracle is not None
            found = encoded(vectors_BD, dtype)
            if dtype == "int8":
                assert (same_zeros(found, vectors_BD) == same_zeros(oracle, vectors_BD)).all()
            else:
                assert found.tobytes() == oracle.tobytes()
        else:
            with pytest.raises(DataError, match=r"^row \d"):
                encode_rows(vectors_BD, dtype)


@pytest.mark.parametrize("embedding_dim", [1, 2, 15, 16, 17, 63, 64, 65, 513])
def test_every_width_is_encoded_the_same_way(embedding_dim: int) -> None:
    """Widths on both sides of the vector registers': the oracle's bytes, and they decode to within the rounding."""
    vectors_BD = np.random.default_rng(embedding_dim).standard_normal((37, embedding_dim), np.float32)
    for dtype, tolerance in (("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.0)):
        oracle = quantize.pack(vectors_BD, dtype)
        assert (encoded(vectors_BD, dtype) == oracle.view(np.uint8).reshape(37, -1)).all()
        half_step = np.ptp(vectors_BD, axis=1, keepdims=True) / 510 * 1.001 + 1e-6 if dtype == "int8" else 1e-7
        back = decode_rows(encode_rows(vectors_BD, dtype), dtype, embedding_dim)
        assert (np.abs(back - vectors_BD) <= tolerance * np.abs(vectors_BD) + half_step).all()


@given(rows(limit=1e30))
def test_int8_decodes_to_what_the_store_reads(vectors_BD: Floats) -> None:
    """`decode_rows` gives the floats of `quantize.dequantize`."""
    back = decode_rows(encode_rows(vectors_BD, "int8"), "int8", vectors_BD.shape[1])
    oracle = quantize.dequantize(quantize.to_torch(encoded(vectors_BD, "int8"), "int8")).numpy()
    assert back.tobytes() == oracle.tobytes()


@given(rows())
def test_float32_is_the_array_itself(vectors_BD: Floats) -> None:
    """The bytes of the vectors, not a copy of them."""
    data = encode_rows(vectors_BD, "float32")
    assert bytes(data) == vectors_BD.astype("<f4").tobytes()
    assert not len(data) or np.shares_memory(np.frombuffer(data, np.uint8), vectors_BD)
    assert decode_rows(data, "float32", vectors_BD.shape[1]).tobytes() == vectors_BD.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_takes_the_bytes(dtype: str) -> None:
    """A buffer of the caller's is filled and comes back, wherever it starts in memory, neighbours untouched."""
    vectors_BD = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    num_bytes = 5 * row_bytes(dtype, 7)
    room = bytearray(b"\xaa" * (num_bytes + 2))
    data = encode_rows(vectors_BD, dtype, memoryview(room)[1:-1])
    assert bytes(data) == bytes(room[1:-1]) == bytes(encode_rows(vectors_BD, dtype))
    assert room[0] == room[-1] == 0xAA
    with pytest.raises(DataError, match=f"out has 3 bytes; 5 rows of {dtype} take {num_bytes}"):
        encode_rows(vectors_BD, dtype, bytearray(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_that_are_not_contiguous_are_encoded_by_value(dtype: str) -> None:
    """Every second row, columns in reverse: the bytes of a plain copy."""
    vectors_BD = np.random.default_rng(1).standard_normal((8, 6), np.float32)[::2, ::-1]
    assert bytes(encode_rows(vectors_BD, dtype)) == bytes(encode_rows(vectors_BD.copy(), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_vectors_are_no_bytes(dtype: str) -> None:
    """An empty batch is an empty body, and reads back as one."""
    assert bytes(encode_rows(np.empty((0, 64), np.float32), dtype)) == b""
    assert decode_rows(b"", dtype, 64).shape == (0, 64)


def test_numbers_that_a_dtype_lacks_are_refused_with_their_row() -> None:
    """The last number that fits does; the next one names its row, its size and what to ask for."""
    vectors_BD = np.zeros((5, 4), np.float32)
    vectors_BD[3, 1] = np.nextafter(np.float32(65520), np.float32(0))
    assert decode_rows(encode_rows(vectors_BD, "float16"), "float16", 4)[3, 1] == 65504
    vectors_BD[3, 1] = -65520
    with pytest.raises(DataError, match=r"row 3 reaches 65520, float16 holds numbers up to 65504; ask for bfloat16"):
        encode_rows(vectors_BD, "float16")
    vectors_BD[3, 1] = np.array(0x7F7F7FFF, np.uint32).view(np.float32)
    assert np.isfinite(decode_rows(encode_rows(vectors_BD, "bfloat16"), "bfloat16", 4)).all()
    vectors_BD[3, 1] = np.array(0x7F7F8000, np.uint32).view(np.float32)
    with pytest.raises(DataError, match=r"row 3 reaches 3\.39\d+e\+38, bfloat16 .* ask for float32"):
        encode_rows(vectors_BD, "bfloat16")
    vectors_BD[3, 2] = -3e38
    with pytest.raises(DataError, match=r"row 3 goes from -3e\+38 to 3\.39\d+e\+38, too far for int8; ask for float32"):
        encode_rows(vectors_BD, "int8")


def test_sizes_of_rows() -> None:
    """Bytes of a row of 64 numbers, and an error that lists the dtypes."""
    assert {dtype: row_bytes(dtype, 64) for dtype in DTYPES} == {
        "float32": 256,
        "float16": 128,
        "bfloat16": 128,
        "int8": 72,
    }
    with pytest.raises(ConfigError, match="dtype must be one of float32, float16, bfloat16, int8, got 'int4'"):
        encode_rows(np.zeros((1, 2), np.float32), "int4")


def test_encoding_needs_no_torch() -> None:
    """A process that only encodes loads neither torch nor, before the first bytes, numba."""
    script = (
        "import sys, numpy as np; from embstore.wire import encode_rows; assert 'numba' not in sys.modules;"
        "encode_rows(np.zeros((1, 2), np.float32), 'float16');"
        "assert 'torch' not in sys.modules and 'embstore.kernels.cpu.wire' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
