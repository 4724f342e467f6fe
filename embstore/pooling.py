"""Pooling: bags of ids to one vector each, as `torch.nn.EmbeddingBag` does it, for every scheme.

Ids come flat; `offsets` says where each bag starts, and each bag ends where the next one starts, the last one at the
end of the ids (torch's `include_last_offset=False`): 5 ids with offsets [0, 3] are two bags, of 3 and of 2 ids. An
offset that is followed by the same offset, or is the number of ids, makes an empty bag.

* `sum`: sum of w e; `mean`: sum of w e / sum of w; `max`: the largest of each number. e: an id's vector, w: its weight.
* Without weights w is 1. `sum` takes any finite weights, as torch does. For `mean` torch takes none: here it is the
  weighted mean (TensorFlow's combiner "mean"), with weights of 0 and above. `max` takes none, as in torch.
* An empty bag is zeros, as in torch; so is a `mean` whose weights are all 0.
* Ids that are not there, under on_missing `zero`, are left out, as `padding_idx` is in torch: they add nothing to a
  sum, do not count in a mean, are no candidate for a maximum. The vector that `default` or `hash` gives them counts.

Each id's vector is composed first and pooled then: a product of pooled factors is not the pooled product. Ids are
composed a chunk at a time into a buffer that stays in the processor's cache. On a CPU sums are float32 in the order
of the ids, whatever the chunks and threads; on a GPU every chunk is summed by torch.

Reads what looking the ids up reads; 2 D operations an id.
"""

# Shapes: B ids, G bags, D embedding_dim, C ids of a chunk.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from embstore.errors import ConfigError, DataError
from embstore.kernels import Loops
from embstore.parallel import in_parts

cpu_pooling = Loops("cpu.pooling")

Pooling = Literal["sum", "mean", "max"]
POOLINGS: tuple[Pooling, ...] = ("sum", "mean", "max")
CACHED_BYTES = 512 << 10
"""Bytes of vectors composed before they are pooled: 2,048 ids of 64 floats, half of a small second-level cache."""
DEVICE_BYTES = 64 << 20
"""The same on a GPU, where a chunk has to be worth its launches."""

Floats = NDArray[np.float32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Bags:
    """Which bag each of B ids is in, and what becomes of a bag; `Bags.of` checks what a caller says."""

    offsets_G: Int64s
    bag_B: Int64s
    weights_B: Floats
    pooling: Pooling

    @property
    def num_ids(self) -> int:
        """Ids in all bags."""
        return len(self.bag_B)

    @property
    def num_bags(self) -> int:
        """Bags, and rows of the answer."""
        return len(self.offsets_G)

    @staticmethod
    def of(num_ids: int, offsets: Any, pooling: Any, weights: Any = None) -> Bags:
        """The bags of `num_ids` ids; ConfigError or DataError says what is wrong and what would be right.

        offsets: integers [G]; pooling: sum, mean or max; weights: numbers [B], None for all 1.
        """
        if offsets is None:
            given = "weights" if pooling is None else f"pooling {_shown(pooling)}"
            raise ConfigError(f"{given} without offsets: give offsets, the place where each bag starts; [0] is one bag")
        if pooling is None:
            raise ConfigError(f"offsets without pooling: give pooling, one of {', '.join(POOLINGS)}")
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {_shown(pooling)}")
        offsets_G = _checked_offsets(offsets, num_ids)
        if weights is None:
            weights_B = np.ones(num_ids, np.float32)
        elif pooling == "max":
            raise ConfigError("pooling 'max' takes no weights: leave them out, or pool by sum or mean")
        else:
            weights_B = _checked_weights(weights, num_ids, pooling)
        lengths_G = np.diff(offsets_G, append=np.int64(num_ids))
        return Bags(offsets_G, np.repeat(np.arange(len(offsets_G)), lengths_G), weights_B, pooling)


def pool(
    bags: Bags,
    ids_B: Int64s,
    lookup: Callable[[Any, Any], None],
    embedding_dim: int,
    *,
    missing_D: Floats | None = None,
    device: str = "cpu",
    num_threads: int = 1,
) -> Floats:
    """One vector a bag, float32 [G, D]; DataError when one does not fit float32.

    lookup(ids, out): writes the vectors of ids that are not negative, numpy arrays where device is "cpu", tensors on
    the device elsewhere. missing_D: the vector of negative ids; None: they are left out.
    """
    bag_B, weights_B = bags.bag_B, bags.weights_B
    if missing_D is None:
        kept_B = ids_B >= 0
        bag_B = np.where(kept_B, bag_B, -1)
        counted, counts_as = bag_B[kept_B], weights_B[kept_B]
    else:
        counted, counts_as = bag_B, weights_B
    start = -np.inf if bags.pooling == "max" else 0.0
    out_GD = np.full((bags.num_bags, embedding_dim), start, np.float32)
    if device == "cpu":
        _pool_cpu(bags, bag_B, ids_B, lookup, missing_D, num_threads, out_GD)
    else:
        _pool_torch(bags, ids_B, lookup, missing_D, device, out_GD)
    if bags.pooling == "max":
        out_GD[np.bincount(counted, minlength=bags.num_bags) == 0] = 0.0
    elif bags.pooling == "mean":
        with np.errstate(over="ignore"):
            out_GD /= _divisors(np.bincount(counted, counts_as, bags.num_bags))[:, None]
    bad_G = ~np.isfinite(out_GD).all(axis=1)
    if bad_G.any():
        raise DataError(f"bag {int(bad_G.argmax())}: its {bags.pooling} does not fit float32")
    return out_GD


def _pool_cpu(
    bags: Bags,
    bag_B: Int64s,
    ids_B: Int64s,
    lookup: Callable[[Any, Any], None],
    missing_D: Floats | None,
    num_threads: int,
    out_GD: Floats,
) -> None:
    embedding_dim = out_GD.shape[1]

    def run(first: Int64s, last: Int64s) -> None:
        """Ids from first[0] to last[0]: whole bags, which no other thread has."""
        step = chunk_ids(embedding_dim, CACHED_BYTES)
        scratch_CD = np.empty((min(step, int(last[0] - first[0])), embedding_dim), np.float32)
        for at in range(int(first[0]), int(last[0]), step):
            chunk = slice(at, min(at + step, int(last[0])))
            ids_C, bag_C = ids_B[chunk], bag_B[chunk]
            vectors_CD = scratch_CD[: len(ids_C)]
            lookup(ids_C, vectors_CD)
            if missing_D is not None:
                vectors_CD[ids_C < 0] = missing_D
            if bags.pooling == "max":
                cpu_pooling.max_to_bags(vectors_CD, bag_C, out_GD)
            else:
                cpu_pooling.add_to_bags(vectors_CD, bags.weights_B[chunk], bag_C, out_GD)

    cuts = _cuts(bags, num_threads)
    in_parts(len(cuts) - 1, run, cuts[:-1], cuts[1:])


def _cuts(bags: Bags, parts: int) -> Int64s:
    """Where the ids are cut for `parts` threads: starts of bags, as near to equal parts as they lie."""
    wanted = np.arange(1, parts) * bags.num_ids // parts
    starts = bags.offsets_G[np.searchsorted(bags.offsets_G, wanted, side="right") - 1]
    return np.concatenate([[0], starts, [bags.num_ids]]).astype(np.int64)


def _pool_torch(
    bags: Bags,
    ids_B: Int64s,
    lookup: Callable[[Any, Any], None],
    missing_D: Floats | None,
    device: str,
    out_GD: Floats,
) -> None:
    """A chunk's bags are rows next to each other: torch pools them, then they join what earlier chunks left there."""
    largest = bags.pooling == "max"
    out = torch.from_numpy(out_GD).to(device)
    step = chunk_ids(out_GD.shape[1], DEVICE_BYTES)
    for at in range(0, bags.num_ids, step):
        chunk = slice(at, at + step)
        ids_C = torch.tensor(ids_B[chunk], device=device)  # a copy: ids of a request may be read-only
        vectors_CD = torch.zeros((len(ids_C), out_GD.shape[1]), device=device)
        lookup(ids_C, vectors_CD)
        if missing_D is not None:
            vectors_CD[ids_C < 0] = torch.tensor(missing_D, device=device)
        elif largest:
            vectors_CD[ids_C < 0] = -torch.inf
        first, last = int(bags.bag_B[chunk][0]), int(bags.bag_B[chunk][-1]) + 1
        pooled = F.embedding_bag(
            torch.arange(len(ids_C), device=device),
            vectors_CD,
            torch.tensor(np.maximum(bags.offsets_G[first:last] - at, 0), device=device),
            mode="max" if largest else "sum",
            per_sample_weights=None if largest else torch.tensor(bags.weights_B[chunk], device=device),
        )
        if largest:
            out[first:last] = torch.maximum(out[first:last], pooled)
        else:
            out[first:last] += pooled
    torch.from_numpy(out_GD).copy_(out)


def chunk_ids(embedding_dim: int, num_bytes: int) -> int:
    """How many ids are composed before they are pooled."""
    return max(64, num_bytes // (4 * embedding_dim))


def _divisors(totals_G: NDArray[Any]) -> Floats:
    """What the sums of a mean are divided by; 1 where nothing was added."""
    bad_G = totals_G > np.finfo(np.float32).max
    if bad_G.any():
        at = int(bad_G.argmax())
        raise DataError(f"bag {at}: its weights add up to {totals_G[at]:g}, which does not fit float32")
    return np.where(totals_G > 0, totals_G, 1.0).astype(np.float32)


def _checked_offsets(offsets: Any, num_ids: int) -> Int64s:
    given_G = _array("offsets", offsets, np.int64)
    if given_G.dtype.kind not in "iu":
        raise DataError(f"offsets must be 64-bit integers, got {given_G.dtype}")
    if len(given_G) == 0 and num_ids:
        raise DataError(f"offsets is empty, but there are {num_ids:,} ids: the first bag starts at 0")
    if len(given_G) and given_G[0] != 0:
        raise DataError(f"offsets[0] is {given_G[0]}: it must be 0, where the first bag starts")
    falls = np.flatnonzero(given_G[1:] < given_G[:-1])
    if len(falls):
        at = int(falls[0]) + 1
        raise DataError(f"offsets[{at}] is {given_G[at]}, less than {given_G[at - 1]} before it: bags are in order")
    if len(given_G) and given_G[-1] > num_ids:
        at = int(np.searchsorted(given_G, num_ids, side="right"))
        raise DataError(f"offsets[{at}] is {given_G[at]}, past the end of {num_ids:,} ids: at most {num_ids} is right")
    return np.ascontiguousarray(given_G, np.int64)


def _checked_weights(weights: Any, num_ids: int, pooling: Pooling) -> Floats:
    given_B = _array("weights", weights, np.float32)
    if given_B.dtype.kind not in "fiu":
        raise DataError(f"weights must be numbers, got {given_B.dtype}")
    if len(given_B) != num_ids:
        raise DataError(f"weights has {len(given_B):,} numbers for {num_ids:,} ids: give one for each id")
    with np.errstate(over="ignore"):
        weights_B: Floats = np.ascontiguousarray(given_B, np.float32)
    bad = np.flatnonzero(~np.isfinite(weights_B))
    if len(bad):
        raise DataError(f"weights[{bad[0]}] is {given_B[bad[0]]}: a weight is a finite float32 number")
    bad = np.flatnonzero(weights_B < 0)
    if len(bad) and pooling == "mean":
        raise DataError(f"weights[{bad[0]}] is {given_B[bad[0]]}: a mean takes weights of 0 and above, a sum takes any")
    return weights_B


def _array(what: str, values: Any, of_nothing: type) -> NDArray[Any]:
    """Numbers as they came, [n]; DataError when they are no flat list."""
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (ValueError, TypeError) as error:  # lists of different lengths; a dtype that numpy does not have
        raise DataError(f"{what} must be a flat list of numbers: {error}") from error
    if array.ndim != 1:
        raise DataError(f"{what} must be one-dimensional, got shape {array.shape}")
    return array if array.size or isinstance(values, np.ndarray | torch.Tensor) else array.astype(of_nothing)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
