"""A module within a number of published bytes, and its vectors as they would be served."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embstore.compress.measure import Lookup
from embstore.errors import ConfigError
from embstore.fitting import Progress
from embstore.quantize import check_dtype, for_kernels, pack_tensors
from embstore.schemes.base import Scheme
from embstore.schemes.options import check_options

NUM_TRIALS = 40
NUM_FITS = 4
LARGEST_FACTOR = 8
"""No storage of rows is smaller than float32 by more than this."""


def fit_within(
    scheme: type[Scheme],
    vectors_ND: Tensor,
    num_bytes: int,
    *,
    dtype: str = "float32",
    weights_N: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scheme:
    """The scheme's fit that takes at most `num_bytes` once its rows are stored as `dtype`; ConfigError if none does.

    A fit is told its size in float32. Packed rows are smaller, so the size that fits is searched for by building
    modules without data, and where the fitted module takes more than the built one did, a smaller one is fitted.
    """
    check_dtype(dtype)
    options = dict(options or {})

    def build(size: int) -> Scheme:
        return _built(scheme, vectors_ND, size, weights_N, options)

    size = num_bytes if dtype == "float32" else float32_size(build, num_bytes, dtype, scheme.name)
    for _ in range(NUM_FITS):
        generator = torch.Generator().manual_seed(seed)
        given = {"weights_N": weights_N, "generator": generator, "progress": progress} | options
        module = _call(scheme, options, partial(scheme.fit, vectors_ND, size, **given))
        taken = module.num_bytes(dtype)
        if taken <= num_bytes:
            return module.eval()
        size = int(size * num_bytes / taken)
    raise ConfigError(f"{scheme.name} with {dtype} rows does not fit {num_bytes:,} bytes: its fit takes {taken:,}")


def float32_size(build: Callable[[int], Scheme], num_bytes: int, dtype: str, name: str) -> int:
    """The largest float32 size whose module takes at most `num_bytes` with rows of `dtype`, by bisection.

    ConfigError when every size that can be built takes more, with the reason that the smallest cannot be built.
    """
    low, high = 0, LARGEST_FACTOR * num_bytes + 1
    best, reason, unpacked, least = 0, None, None, None
    for _ in range(NUM_TRIALS):
        size = (low + high) // 2
        if size in (low, high):
            break
        try:
            module = build(size)
        except ConfigError as error:
            low, reason = size, error  # too small for this scheme, or wrong whatever the size
            continue
        try:
            taken = module.num_bytes(dtype)
        except ConfigError as error:
            high, unpacked = size, error  # rows too short to pack, which more bytes make shorter (pq) or change nothing
            continue
        if taken <= num_bytes:
            low = best = size
        else:
            high, least = size, taken
    if best:
        return best
    if least is None:
        cause = unpacked or reason
        assert cause is not None
        raise cause
    raise ConfigError(
        f"{name} with {dtype} rows cannot be stored in {num_bytes:,} bytes here: the least is {least:,}"
    ) from reason


def served(module: Scheme, dtype: str) -> Lookup:
    """The lookup of what would be published: its tensors with rows stored as `dtype`, and the kernels of the server."""
    config, exported = module.export()
    layout = module.layout(config)
    arrays = {
        name: np.ascontiguousarray(exported[name].cpu().numpy(), slot.numpy_dtype) for name, slot in layout.items()
    }
    tensors = {name: for_kernels(array) for name, array in pack_tensors(arrays, layout, dtype).items()}

    def lookup(ids_B: Any, out_BD: Any) -> None:
        module.lookup(config, tensors, ids_B, out_BD)

    return lookup


def _built(
    scheme: type[Scheme], vectors_ND: Tensor, size: int, weights_N: Tensor | None, options: Mapping[str, Any]
) -> Scheme:
    """A module of this size, without data where the scheme can do without, and in any case without learning any."""
    given = {"frequencies": weights_N} | {name: value for name, value in options.items() if _sizes(scheme, name)}
    build = partial(scheme.from_budget, len(vectors_ND), vectors_ND.shape[1], size, **given)
    try:
        with torch.device("meta"):
            return _call(scheme, options, build)
    except (NotImplementedError, RuntimeError):  # it looks at numbers while it is built
        return _call(scheme, options, build)


def _sizes(scheme: type[Scheme], option: str) -> bool:
    """Whether a module is built with the option; what only `fit` takes changes no sizes."""
    takers = (scheme.from_budget, scheme)
    return option not in inspect.signature(scheme.fit).parameters or any(
        option in inspect.signature(taker).parameters for taker in takers
    )


def _call(scheme: type[Scheme], options: Mapping[str, Any], make: Callable[[], Scheme]) -> Scheme:
    """`make()`; an option whose value the scheme cannot use is a ConfigError."""
    check_options(scheme, options)
    try:
        return make()
    except (TypeError, ValueError, OverflowError) as error:
        if not options:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"{scheme.name} cannot be made with {given}: {error}") from error
