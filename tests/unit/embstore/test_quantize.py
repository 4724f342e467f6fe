"""Rows in fewer bits: FBGEMM's bytes, errors within half a step, and the same floats in every reader."""

# Shapes: R rows, W columns.

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embstore.errors import ConfigError, VerificationFailed
from embstore.kernels.cpu import gather as cpu_gather
from embstore.quantize import (
    DTYPES,
    TensorSpec,
    check_rows_finite,
    dequantize,
    for_kernels,
    pack,
    pack_bfloat16,
    packed_layout,
    packed_spec,
    to_torch,
    unpack_bfloat16,
)

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]


def rows(low: float = -100.0, high: float = 100.0) -> st.SearchStrategy[Floats]:
    """Tables of an even width with numbers of very different sizes."""
    shapes = st.tuples(st.integers(1, 6), st.integers(1, 12).map(lambda half: 2 * half))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32)))


def unpacked(array: Floats, dtype: str) -> Floats:
    """What comes back from storage."""
    found: Floats = dequantize(to_torch(pack(array, dtype), dtype)).numpy()
    return found


@given(rows())
def test_int8_bytes_are_those_of_torchs_prepack(array: Floats) -> None:
    """Codes, scale and bias as `torch.ops.quantized.embedding_bag_byte_prepack` writes them."""
    oracle = torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(array)).numpy()
    packed = pack(array, "int8")
    assert packed.dtype == np.uint8
    tails = [np.ascontiguousarray(found[:, -8:]).view(np.float32) for found in (packed, oracle)]
    assert (tails[0] == tails[1]).all()  # as numbers: which of two zeros is the least is an accident
    assert (np.abs(packed[:, :-8].astype(int) - oracle[:, :-8]) <= 1).all()  # its vector code may round otherwise
    back = torch.ops.quantized.embedding_bag_byte_unpack(torch.from_numpy(packed)).numpy()
    np.testing.assert_allclose(unpacked(array, "int8"), back, rtol=1e-6, atol=1e-6 * np.abs(array).max() + 1e-30)


@given(rows())
def test_int4_bytes_are_those_of_torchs_prepack(array: Floats) -> None:
    """Two codes a byte, then scale and bias in half precision, as `embedding_bag_4bit_prepack` writes them."""
    oracle = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(array)).numpy()
    packed = pack(array, "int4").view(np.uint8)
    tails = [np.ascontiguousarray(found[:, -4:]).view(np.float16) for found in (packed, oracle)]
    assert (tails[0] == tails[1]).all()
    for shift in (0, 4):
        ours, theirs = ((codes[:, :-4] >> shift) & 15 for codes in (packed, oracle))
        assert (np.abs(ours.astype(int) - theirs) <= 1).all()
    back = torch.ops.quantized.embedding_bag_4bit_unpack(torch.from_numpy(packed)).numpy()
    np.testing.assert_allclose(unpacked(array, "int4"), back, rtol=1e-6, atol=1e-6 * np.abs(array).max() + 1e-30)


def test_ordinary_rows_have_torchs_bytes_exactly() -> None:
    """On normal numbers every byte is the same, codes too."""
    array = np.random.default_rng(0).standard_normal((500, 64), np.float32)
    tensor = torch.from_numpy(array)
    assert (pack(array, "int8") == torch.ops.quantized.embedding_bag_byte_prepack(tensor).numpy()).all()
    assert (pack(array, "int4").view(np.uint8) == torch.ops.quantized.embedding_bag_4bit_prepack(tensor).numpy()).all()


@given(rows())
def test_int8_is_within_half_a_step(array: Floats) -> None:
    """|read - written| <= scale / 2, and a row of equal numbers is exact."""
    span = array.max(axis=1, keepdims=True) - array.min(axis=1, keepdims=True)
    error = np.abs(unpacked(array, "int8").astype(float) - array)
    assert (error <= span / 510 + 2e-7 * np.abs(array).max() + 2e-8).all()


@given(rows())
def test_int4_is_within_half_a_step_and_what_half_precision_loses(array: Floats) -> None:
    """|read - written| <= scale / 2 + 15 scale 2^-11 + |min| 2^-10."""
    low, high = array.min(axis=1, keepdims=True), array.max(axis=1, keepdims=True)
    scale = (high - low + np.abs(low) * 2**-10) / 15
    error = np.abs(unpacked(array, "int4").astype(float) - array)
    assert (error <= scale / 2 * 1.001 + 15 * scale * 2**-11 + np.abs(low) * 2**-10 + 1e-6).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_bfloat16_is_torchs(values: list[float]) -> None:
    """Rounded to nearest even, as torch rounds."""
    array = np.array(values, np.float32)
    oracle = torch.from_numpy(array).bfloat16()
    assert (pack_bfloat16(array).view(np.int16) == oracle.view(torch.int16).numpy()).all()
    assert (unpack_bfloat16(pack_bfloat16(array)) == oracle.float().numpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(array=rows(-6e4, 6e4))
def test_compiled_loops_read_what_torch_reads(dtype: str, array: Floats) -> None:
    """The same bits from the kernel and from torch, subnormal halves and constant rows included."""
    packed = pack(array, dtype)
    out = np.empty_like(array)
    cpu_gather.gather(for_kernels(packed), np.arange(len(array)), out)
    assert (out.view(np.uint32) == dequantize(to_torch(packed, dtype)).numpy().view(np.uint32)).all()


def test_every_half_and_every_bfloat16_is_read_exactly() -> None:
    """All finite 16-bit patterns."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    out = np.empty((1 << 16, 1), np.float32)
    cpu_gather.gather(halves.view(np.int16)[:, None], np.arange(1 << 16), out)
    finite = np.isfinite(halves)
    assert (out[finite, 0].view(np.uint32) == halves[finite].astype(np.float32).view(np.uint32)).all()
    cpu_gather.gather(bits[:, None], np.arange(1 << 16), out)
    assert (out[:, 0].view(np.uint32) == unpack_bfloat16(bits).view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_numbers_that_half_precision_lacks_are_refused(dtype: str) -> None:
    """Past 65,504 there is no half; the error names the row and what to use."""
    array = np.zeros((5, 4), np.float32)
    array[3, 1] = -1e6
    with pytest.raises(VerificationFailed, match=rf"row 3 reaches 1e\+06, {dtype} holds numbers up to 65504; use"):
        pack(array, dtype)


def test_a_slot_says_what_it_becomes() -> None:
    """Widths, dtypes, bytes; int4 of odd rows is refused; rows that would not shrink stay."""
    spec = TensorSpec((10, 64), rows=True)
    found = {dtype: packed_spec(spec, dtype).num_bytes for dtype in DTYPES}
    assert found == {"float32": 2560, "float16": 1280, "bfloat16": 1280, "int8": 720, "int4": 360}
    assert packed_spec(TensorSpec((10, 2), rows=True), "int8") == TensorSpec((10, 2), rows=True)
    assert packed_spec(TensorSpec((10, 64)), "int8") == TensorSpec((10, 64))
    with pytest.raises(ConfigError, match="rows of 'weight' have 3 columns, which is odd; use int8, or an even width"):
        packed_layout({"weight": TensorSpec((10, 3), rows=True)}, "int4")
    with pytest.raises(ConfigError, match="no tensor here gets smaller as int8: memory float32"):
        packed_layout({"memory": TensorSpec((10,))}, "int8")
    with pytest.raises(ConfigError, match="dtype must be one of float32, float16, bfloat16, int8, int4, got 'int2'"):
        packed_spec(spec, "int2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_that_makes_infinities_is_found(dtype: str) -> None:
    """A scale, a bias or a number that is no longer finite: the row's number."""
    packed = pack(np.ones((7, 8), np.float32), dtype).copy()
    assert len(check_rows_finite(packed, dtype)) == 0
    packed.view(np.uint8)[4, -2:] = 0xFF
    assert check_rows_finite(packed, dtype).tolist() == [4]
