"""Row-wise storage of 2-d float tensors, chosen at publish: float16, bfloat16, int8, int4 beside float32.

The layout is FBGEMM's with scale and bias last (`src/QuantUtils.cc`; `torch.ops.quantized.embedding_bag_byte_prepack`
and `..._4bit_prepack` write the same bytes):

* int8: W codes, then scale and bias as float32: W + 8 bytes. scale = (max - min) / 255, bias = min.
* int4: W / 2 bytes of two codes each, the even column in the low half, then scale and bias as float16: W / 2 + 4 bytes.

A value reads back as `code * scale + bias`, rounded twice. The error is at most half a step: `(max - min) / 510` for
int8; int4 adds what float16 loses of scale and bias.

The array's dtype says how rows are stored, so kernels and torch need no other flag:

    storage     numpy     torch      safetensors
    float32     float32   float32    F32
    float16     float16*  float16    F16           * int16 of the same bits once a table is loaded
    bfloat16    uint16    bfloat16   BF16
    int8        uint8     uint8      U8
    int4        int8      int8       I8
"""

# Shapes: R rows, W columns of the float tensor, P columns (of bytes) of a packed row.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.errors import ConfigError, VerificationFailed
from embstore.store.manifest import DTYPES

_NUMPY = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int8": "u1",
    "int4": "i1",
    "uint8": "u1",
    "uint16": "<u2",
    "int32": "<i4",
    "int64": "<i8",
}
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class TensorSpec:
    """What a scheme stores under one name: shape, dtype, and whether its rows may be stored in any of DTYPES."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    rows: bool = False

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the array on disk."""
        return np.dtype(_NUMPY[self.dtype])

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.numpy_dtype.itemsize


def check_dtype(dtype: str) -> None:
    """ConfigError unless rows can be stored as `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def packed_spec(spec: TensorSpec, dtype: str, name: str = "the tensor") -> TensorSpec:
    """What `spec` becomes when rows are stored as `dtype`; rows that would not get smaller stay float32."""
    check_dtype(dtype)
    if not spec.rows or dtype == "float32":
        return spec
    rows, width = spec.shape
    if dtype in ("float16", "bfloat16"):
        return replace(spec, dtype=dtype)
    packed = width + 8 if dtype == "int8" else width // 2 + 4
    if packed >= 4 * width:
        return spec
    if dtype == "int4" and width % 2:
        raise ConfigError(
            f"int4 keeps two numbers in a byte: rows of {name} have {width} columns, which is odd; "
            "use int8, or an even width"
        )
    return TensorSpec((rows, packed), dtype, rows=True)


def packed_layout(layout: Mapping[str, TensorSpec], dtype: str) -> dict[str, TensorSpec]:
    """The layout of a scheme's tensors with rows stored as `dtype`; ConfigError when nothing gets smaller by it."""
    packed = {name: packed_spec(spec, dtype, repr(name)) for name, spec in layout.items()}
    if packed == dict(layout) and dtype != "float32":
        names = ", ".join(f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in layout.items())
        raise ConfigError(f"no tensor here gets smaller as {dtype}: {names}; publish it as float32")
    return packed


def pack(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Float32 rows [R, W] stored as `dtype`; VerificationFailed where float16 cannot hold a number.

    Numbers near the end of float32's range become infinite (their span does): publishing refuses the result.
    """
    if dtype == "float32":
        return array
    if dtype == "bfloat16":
        return pack_bfloat16(array)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if dtype == "float16":
            return _pack_float16(array)
        return _pack_int8(array) if dtype == "int8" else _pack_int4(array)


def pack_tensors(
    tensors: Mapping[str, NDArray[Any]], layout: Mapping[str, TensorSpec], dtype: str
) -> dict[str, NDArray[Any]]:
    """A scheme's tensors with the rows that get smaller stored as `dtype`; the others are the same arrays."""
    specs = packed_layout(layout, dtype)
    return {name: pack(array, dtype) if specs[name] != layout[name] else array for name, array in tensors.items()}


def _pack_float16(array: NDArray[np.float32]) -> NDArray[np.float16]:
    halves = array.astype(np.float16)
    _check_halves(halves, array, "float16")
    return halves


def pack_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def unpack_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers whose upper halves these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack_int8(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    low_R1 = array.min(axis=1, keepdims=True)
    span_R1 = array.max(axis=1, keepdims=True) - low_R1
    inverse_R1 = np.float32(255) / (span_R1 + np.float32(1e-8))
    codes_RW = np.rint((array - low_R1) * inverse_R1).astype(np.uint8)
    tail_R2 = np.concatenate([span_R1 / np.float32(255), low_R1], axis=1).astype("<f4")
    return np.concatenate([codes_RW, tail_R2.view(np.uint8)], axis=1)


def _pack_int4(array: NDArray[np.float32]) -> NDArray[np.int8]:
    low_R1 = array.min(axis=1, keepdims=True).astype(np.float16)
    span_R1 = array.max(axis=1, keepdims=True) - low_R1.astype(np.float32)
    scale_R1 = (span_R1 / np.float32(15)).astype(np.float16)
    scale_R1[scale_R1 == 0] = 1
    inverse_R1 = np.float32(1) / scale_R1.astype(np.float32)
    _check_halves(low_R1, array, "int4")
    _check_halves(scale_R1, array, "int4")
    codes_RW = np.clip(np.rint((array - low_R1.astype(np.float32)) * inverse_R1), 0, 15).astype(np.uint8)
    tail_R2 = np.concatenate([scale_R1, low_R1], axis=1).astype("<f2")
    packed_RP = np.concatenate([codes_RW[:, 0::2] | (codes_RW[:, 1::2] << 4), tail_R2.view(np.uint8)], axis=1)
    return np.ascontiguousarray(packed_RP).view(np.int8)


def _check_halves(halves: NDArray[np.float16], array: NDArray[np.float32], dtype: str) -> None:
    if not np.isfinite(halves).all():
        row = int(np.flatnonzero(~np.isfinite(halves).all(axis=1))[0])
        raise VerificationFailed(
            f"row {row:,} reaches {np.abs(array[row]).max():g}, {dtype} holds numbers up to {_HALF_MAX:g}; "
            "use bfloat16, int8 or float32"
        )


def dequantize(rows: Tensor) -> Tensor:
    """Packed rows [..., P] as floats [..., W]; the dtype says how they are packed. Floats wider than 16 bits pass."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        return rows.float()
    if rows.dtype == torch.uint8:
        tail = rows[..., -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return rows[..., :-8].float() * tail[..., :1] + tail[..., 1:]
    if rows.dtype == torch.int8:
        data = rows.view(torch.uint8)
        tail = data[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        codes = torch.stack([data[..., :-4] & 15, data[..., :-4] >> 4], dim=-1).flatten(-2)
        return codes.float() * tail[..., :1] + tail[..., 1:]
    return rows


def take(weight: Tensor, index: Tensor) -> Tensor:
    """`weight[index]` as floats, whatever the rows are stored as."""
    return dequantize(weight[index])


def check_rows_finite(array: NDArray[Any], dtype: str) -> NDArray[np.intp]:
    """The numbers of the rows in which a stored value, a scale or a bias is NaN or infinite."""
    if dtype == "bfloat16":
        bad = (array & 0x7F80) == 0x7F80
    elif dtype == "int8":
        bad = ~np.isfinite(np.ascontiguousarray(array[:, -8:]).view("<f4"))
    elif dtype == "int4":
        bad = ~np.isfinite(np.ascontiguousarray(array[:, -4:]).view("<f2"))
    elif dtype in ("float32", "float16"):
        bad = ~np.isfinite(array)
    else:
        return np.empty(0, np.intp)
    return np.flatnonzero(bad.reshape(len(array), -1).any(axis=1)) if array.ndim and bad.size else np.flatnonzero(bad)


def for_kernels(array: NDArray[Any]) -> NDArray[Any]:
    """An array from disk as CPU kernels take it: float16 as the int16 of the same bits (numba has no half floats)."""
    return array.view(np.int16) if array.dtype == np.float16 else array


def to_torch(array: NDArray[Any], dtype: str) -> Tensor:
    """A copy of an array from disk as a torch tensor of the storage dtype."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if dtype == "float16":
        return torch.from_numpy(array.view(np.float16).copy())
    if dtype == "uint16":
        return torch.from_numpy(array.astype(np.int32))
    return torch.from_numpy(np.array(array))
