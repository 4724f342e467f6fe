"""Ids as users have them -> ids as the wire has them: little-endian int64, or a list of string keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = Sequence[int] | Sequence[str] | NDArray[Any]
"""What a lookup accepts: `[n]` integers of any width, or `[n]` string keys."""

INT64 = np.dtype("<i8")
MIN_ID, MAX_ID = -(2**63), 2**63 - 1


def normalize_ids(ids: Ids) -> NDArray[np.int64] | list[str]:
    """The same ids, in order, as int64 `[n]` or as a list of n string keys; anything doubtful is refused.

    No ids at all, in a container that does not say of what, are a list: JSON suits tables of both kinds.

    Raises:
        TypeError: not integers, nor strings, or both; floats, bools, None, bytes and sets are not converted.
        ValueError: not 1-d, or an integer outside int64.
    """
    if isinstance(ids, np.ndarray):
        return _from_array(ids)
    if hasattr(ids, "__array__") and not isinstance(ids, np.generic):  # a tensor, a data frame's column
        return _from_array(np.asarray(ids))
    if isinstance(ids, Sequence) and not isinstance(ids, str | bytes | bytearray):
        return _from_sequence(ids)
    raise TypeError(
        f"ids must be a 1-d sequence or array of integers (or of string keys), got {type(ids).__name__}; "
        "put a single id into a list: [3]"
    )


def _from_array(array: NDArray[Any]) -> NDArray[np.int64] | list[str]:
    if array.ndim != 1:
        raise ValueError(f"ids must be 1-d, got shape {array.shape}; flatten them with ids.reshape(-1)")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("ids must not be a masked array; use ids.compressed() or ids.filled(...)")
    kind = array.dtype.kind
    if kind == "i":
        return array.astype(INT64, copy=False)
    if kind == "u":
        if array.dtype.itemsize == 8 and array.size and int(array.max()) > MAX_ID:
            raise _out_of_int64(int(np.argmax(array > MAX_ID)), int(array[array > MAX_ID][0]))
        return array.astype(INT64)
    if kind in "UTO":
        return _from_sequence(array.tolist())
    if array.size == 0 and kind == "f":  # np.array([]) is float64, and nobody meant it
        return []
    raise _wrong_type(str(array.dtype))


def _from_sequence(ids: Sequence[Any]) -> NDArray[np.int64] | list[str]:
    types = set(map(type, ids))  # one pass in C; np.array alone would turn True into 1 and 1.0 into 1
    if types == {int}:
        return _int64(ids)
    if all(issubclass(t, str) for t in types):  # true of no ids, too
        return [str(key) for key in ids]
    if all(issubclass(t, int | np.integer) and t is not bool for t in types):
        return _int64([int(i) for i in ids])
    if any(issubclass(t, list | tuple | np.ndarray) for t in types):
        raise ValueError("ids must be 1-d, got a sequence of sequences; flatten them first")
    raise _wrong_type(" and ".join(sorted(t.__name__ for t in types)))


def _int64(ids: Sequence[int]) -> NDArray[np.int64]:
    try:
        return np.array(ids, dtype=INT64)
    except OverflowError as overflow:
        position = next(i for i, value in enumerate(ids) if not MIN_ID <= value <= MAX_ID)
        raise _out_of_int64(position, ids[position]) from overflow


def _out_of_int64(position: int, value: int) -> ValueError:
    return ValueError(f"ids must fit int64, {MIN_ID} to {MAX_ID}; id {value} at position {position} does not")


def _wrong_type(what: str) -> TypeError:
    return TypeError(
        f"ids must all be integers, or all be string keys, got {what}; "
        "whole numbers in a float array (as beside NaN in a data frame) need a deliberate ids.astype('int64')"
    )
