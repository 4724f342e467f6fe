"""What is published as one table, whatever form it comes in, as arrays, ids and figures that a store can hold."""

# Shapes: N num_embeddings, D embedding_dim.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embstore.errors import ConfigError, DataError
from embstore.ids import Dense, Ids, IdSpace, Vocabulary
from embstore.quantize import TensorSpec
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme, SchemeConfig


@dataclass(frozen=True)
class Publication:
    """What to publish as one table.

    source: a scheme module, an `nn.Embedding`, an array or tensor [N, D], or a state dict (then `scheme` and
    `parameters` say what it is; a single 2-d array is taken for `full`).
    ids: an IdSpace, or the ids in row order; None: ids are 0 .. N - 1.
    hot_ids: the most requested ids, hottest first.
    metrics: figures to keep with the version: JSON values, numpy's numbers and arrays too; NaN and infinity are not.
    default_vector: float [D] for on_missing=default; None: the mean of the table's vectors.
    dtype: how rows are stored: float32, float16, bfloat16, int8 or int4 (see embstore/quantize.py).
    new_id_type: a label may move from string ids to integers, or back; else that is a Conflict, since whoever follows
    the label would get errors at once.
    """

    source: Any
    ids: IdSpace | Ids | None = None
    hot_ids: Sequence[int] | Sequence[str] | NDArray[Any] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    default_vector: Any = None
    scheme: str | None = None
    parameters: Mapping[str, Any] | None = None
    dtype: str = "float32"
    new_id_type: bool = False


def scheme_tensors(publication: Publication) -> tuple[type[Scheme], SchemeConfig, dict[str, NDArray[Any]]]:
    """Scheme, config and arrays of whatever the source is; DataError or ConfigError when it is no table."""
    source = publication.source
    if isinstance(source, Scheme):
        if publication.scheme is not None or publication.parameters is not None:
            raise ConfigError("scheme and parameters must not be given when the source is a Scheme")
        config, tensors = source.export()
        layout = type(source).layout(config)
        return type(source), config, {name: _array(value, name, layout) for name, value in tensors.items()}
    if isinstance(source, nn.Embedding):
        source = {"weight": source.weight}
    if not isinstance(source, Mapping):
        source = {"weight": source}
    scheme = scheme_class(publication.scheme or "full")
    if scheme.name == "full" and len(source) == 1:
        weight = as_float32(next(iter(source.values())), f"array {next(iter(source))!r}")
        if weight.ndim != 2 or 0 in weight.shape:
            raise DataError(f"a table of vectors has shape [ids, dims], got {list(weight.shape)}")
        if publication.parameters is None:
            rows, dim = weight.shape
            return scheme, SchemeConfig(num_embeddings=rows, embedding_dim=dim), {"weight": weight}
        source = {"weight": weight}
    if publication.scheme is None or publication.parameters is None:
        raise ConfigError("a state dict needs scheme and parameters (with num_embeddings and embedding_dim)")
    try:
        config = scheme.Config(**publication.parameters)
    except TypeError as error:
        raise ConfigError(f"parameters of {scheme.name}: {error}") from error
    layout = scheme.layout(config)
    return scheme, config, {name: _array(value, name, layout) for name, value in source.items()}


def _array(value: Any, name: str, layout: Mapping[str, TensorSpec]) -> NDArray[Any]:
    """A tensor as it is published: floats as float32, and codes, maps and packed rows in the scheme's own dtype."""
    if name not in layout or layout[name].dtype == "float32":
        return as_float32(value, f"array {name!r}")
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    dtype = layout[name].numpy_dtype
    if array.dtype.kind not in "iu" or (array.size and not (array.astype(dtype) == array).all()):
        raise DataError(f"array {name!r} holds {array.dtype} numbers that are not {dtype}, which the scheme stores")
    return np.ascontiguousarray(array, dtype)


def as_float32(value: Any, what: str) -> NDArray[np.float32]:
    """Numbers of any kind, from numpy, torch or lists, as float32; too large ones become infinity."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.float().numpy() if value.is_floating_point() else value.numpy()  # numpy has no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} holds {array.dtype}, vectors are numbers")
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32, order="C")


def check_layout(scheme: type[Scheme], layout: Mapping[str, TensorSpec], tensors: Mapping[str, NDArray[Any]]) -> None:
    """DataError unless these are the scheme's arrays; kernels trust them and must not see others."""
    wanted = {name: slot.shape for name, slot in layout.items()}
    given = {name: array.shape for name, array in tensors.items()}
    if wanted != given:
        right, got = (", ".join(f"{n} {list(shape)}" for n, shape in shapes.items()) for shapes in (wanted, given))
        raise DataError(f"tensor shapes do not match scheme {scheme.name}: expected {right}, got {got or 'nothing'}")


def id_space_of(ids: IdSpace | Ids | None, num_embeddings: int) -> IdSpace:
    """The id space of what was given; DataError when it has no ids, or more than the table has rows."""
    if ids is None:
        return Dense(num_embeddings)
    space = ids if isinstance(ids, IdSpace) else Vocabulary.from_ids(ids)
    if not 1 <= space.num_ids <= num_embeddings:
        raise DataError(f"{space.num_ids:,} ids do not fit a table of {num_embeddings:,} rows")
    return space


def hot_ids_of(hot_ids: Any, ids: IdSpace) -> list[int] | list[str]:
    """The hot ids as the manifest has them; DataError for one that the table does not have."""
    listed: list[Any] = hot_ids.tolist() if isinstance(hot_ids, np.ndarray | torch.Tensor) else list(hot_ids)
    if not listed:
        return []
    try:
        rows, missing = ids.rows(listed)
    except TypeError as error:
        raise DataError(f"hot_ids: {error}") from error
    if missing:
        bad = listed[int(np.flatnonzero(rows < 0)[0])]
        raise DataError(f"hot id {bad!r} is not among the table's ids")
    return ids.ids_of(rows)


def plain_metric(value: Any, what: str) -> Any:
    """A metric as JSON has it; DataError names the one that JSON does not have."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_metric(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_metric(item, f"{what}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} is {value}: metrics are finite, leave it out or give None")
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise DataError(f"{what} is of type {type(value).__name__}: metrics are numbers, strings, lists and mappings")
    return value
