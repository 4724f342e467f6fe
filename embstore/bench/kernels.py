"""`embstore bench kernels`: every scheme's loop beside eager torch and beside the floor, in one run.

The tables take about as many bytes as `table_bytes` says, far more than the cache, so rows come from memory; ids are
uniform (the worst case) or Zipf. Networks have no floor of memory: they are measured against the matrix products
they are made of, by torch on the same shapes.
"""

# Shapes: B ids, D embedding_dim.

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.bench.floor import bytes_read, lines_read, make_memory, products_made, runs_of
from embstore.errors import ConfigError
from embstore.parallel import in_parts, num_cores
from embstore.quantize import TensorSpec, for_kernels, pack, packed_layout, to_torch
from embstore.schemes import SCHEMES, scheme_class
from embstore.schemes.base import Progress

BATCHES = (100, 1_000, 16_384, 131_072)
DIMS = (16, 64, 128)
TABLE_BYTES = 256_000_000
RATIO = 16
NETWORKS = ("dhe", "path")
HEADS = ("scheme", "rows", "dim", "ids", "kernel us", "all cores us", "eager us", "floor us", "x floor", "x eager")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "double_hash": {"sum": {}, "concat": {"op": "concat"}},
    "memcom": {"": {}, "bias": {"bias": True}},
    "pq": {"": {}, "two stages": {"num_stages": 2}, "rotated": {"rotation": True}},
    "qr": {"mult": {}, "concat": {"op": "concat"}, "three": {"num_partitions": 3}},
}
"""scheme -> name of a kind of it -> options; a scheme that is not here has one kind."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: microseconds of a lookup of B ids, and what it is compared with.

    floor_us: the gather of the same cache lines, or for networks torch's matrix products of the same shapes.
    """

    scheme: str
    kind: str
    dtype: str
    dim: int
    batch: int
    num_embeddings: int
    table_bytes: int
    bytes_per_id: float
    kernel_us: float
    threads_us: float
    eager_us: float
    floor_us: float

    def cells(self) -> list[str]:
        """What is shown under HEADS."""
        times = (self.kernel_us, self.threads_us, self.eager_us, self.floor_us)
        names = [f"{self.scheme} {self.kind}".strip(), self.dtype, str(self.dim), f"{self.batch:,}"]
        return [*names, *(f"{us:,.1f}" for us in times), f"{times[0] / times[3]:.2f}", f"{times[2] / times[0]:.1f}"]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ratios included."""
        ratios = {
            "kernel_over_floor": round(self.kernel_us / self.floor_us, 3),
            "eager_over_kernel": round(self.eager_us / self.kernel_us, 2),
        }
        return asdict(self) | ratios | {"threads_speedup": round(self.kernel_us / self.threads_us, 2)}


@dataclass(frozen=True)
class Contender:
    """A table of one kind of a scheme, filled with numbers: numpy arrays, and torch tensors over the same memory."""

    scheme: Any
    kind: str
    dtype: str
    config: Any
    arrays: dict[str, NDArray[Any]]
    tensors: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def measure(
    *,
    schemes: Iterable[str] = tuple(SCHEMES),
    dims: Iterable[int] = DIMS,
    batches: Iterable[int] = BATCHES,
    dtypes: Iterable[str] = ("float32",),
    table_bytes: int = TABLE_BYTES,
    zipf: float | None = None,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[Row]:
    """Every combination that there is, in the order of schemes; torch runs on one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        jobs = [
            (name, kind, options, dim, dtype)
            for name in schemes
            for kind, options in OPTIONS.get(name, {"": {}}).items()
            for dim in dims
            for dtype in dtypes
        ]
        for done, (name, kind, options, dim, dtype) in enumerate(jobs):
            if progress is not None:
                progress(f"{name} {kind} {dtype} x {dim}", done, len(jobs))
            try:
                contender = make_contender(name, kind, options, dim, dtype, table_bytes)
            except ConfigError:
                if dtype == "float32":
                    raise
                continue  # this scheme has nothing to store as that dtype
            rows += [_measure(contender, batch, zipf, rounds) for batch in batches]
    finally:
        torch.set_num_threads(threads)
    return rows


def make_contender(
    name: str, kind: str, options: dict[str, Any], dim: int, dtype: str, table_bytes: int, device: str = "cpu"
) -> Contender:
    """A table of about `table_bytes`, RATIO times smaller than the plain one (less where there are few columns).

    On another device than the CPU it has torch tensors alone. ConfigError where nothing can be stored as `dtype`.
    """
    scheme = scheme_class(name)
    ratio = {"full": 1, "mixed_precision": 2}.get(name, min(RATIO, dim // 4))  # below every scheme's ceiling
    num_embeddings = table_bytes * ratio // (4 * dim)
    budget = table_bytes
    if name == "dhe":
        budget = 1_000_000  # a network of a quarter of a million weights, whatever the number of ids
    with torch.device("meta"):
        config, _ = scheme.from_budget(num_embeddings, dim, budget, **options).export()
    slots = packed_layout(scheme.layout(config), dtype)
    rng = np.random.default_rng(0)
    tensors = {key: _filled(slot, config, rng, device) for key, slot in slots.items()}
    arrays = {key: _array(tensor) for key, tensor in tensors.items()} if device == "cpu" else {}
    return Contender(scheme, kind, dtype, config, arrays, tensors)


def _filled(slot: TensorSpec, config: Any, rng: np.random.Generator, device: str) -> torch.Tensor:
    """A tensor of numbers that a slot may hold: its first rows again and again, from a cache line on."""
    block = to_torch(_block(slot, config, rng), slot.dtype).to(device)
    tensor = torch.empty(slot.shape, dtype=block.dtype, device=device)
    for start in range(0, slot.shape[0], len(block)):
        tensor[start : start + len(block)] = block[: slot.shape[0] - start]
    return tensor


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory as CPU kernels take it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return for_kernels(tensor.numpy())


def _block(slot: TensorSpec, config: Any, rng: np.random.Generator) -> NDArray[Any]:
    """Rows that a slot may hold, a million numbers or all of them: the values make no difference to speed."""
    row = int(np.prod(slot.shape[1:]))
    shape = (min(slot.shape[0], max(1, (1 << 20) // max(1, row))), *slot.shape[1:])
    if slot.dtype in ("float32", "float16", "bfloat16"):
        floats = rng.standard_normal(shape, np.float32)
        return pack(floats, slot.dtype)
    high = {"uint8": getattr(config, "num_codes", 256), "int32": getattr(config, "num_buckets", 1)}
    if slot.dtype not in ("int8", "int4"):
        return rng.integers(0, high.get(slot.dtype, 1 << 62), shape).astype(slot.numpy_dtype)
    codes = rng.integers(0, 256, shape, np.uint8).view(slot.numpy_dtype)
    tail = np.array([1, 0], np.float32 if slot.dtype == "int8" else np.float16).view(codes.dtype)  # scale, bias
    codes[:, -len(tail) :] = tail
    return codes


def make_ids(num_embeddings: int, batch: int, zipf: float | None, draws: int) -> NDArray[np.int64]:
    """`draws` batches of ids: uniform, or Zipf with this exponent (id 0 the most frequent)."""
    rng = np.random.default_rng(1)
    if zipf is None:
        return rng.integers(0, num_embeddings, (draws, batch))
    top = float(num_embeddings) ** (1 - zipf)  # inverse of the continuous distribution function
    uniform = rng.random((draws, batch))
    ids = (1 + uniform * (top - 1)) ** (1 / (1 - zipf)) - 1
    capped: NDArray[np.int64] = np.minimum(ids.astype(np.int64), num_embeddings - 1)
    return capped


def best_seconds(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.02
) -> dict[str, float]:
    """Least seconds a call of each; a round repeats a call for about `seconds`, and the candidates take turns.

    The least of several is the time without other programs' interruptions; taking turns makes a machine whose speed
    drifts slow all of them alike.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - begin) / repeats[name])
    return best


def _measure(contender: Contender, batch: int, zipf: float | None, rounds: int) -> Row:
    scheme, config = contender.scheme, contender.config
    draws = max(4, min(200, 400_000 // batch))  # so that a batch is not in the cache when it comes round again
    ids = make_ids(config.num_embeddings, batch, zipf, draws)
    ids_tensors = torch.from_numpy(ids)
    out, out_tensor = np.empty((batch, config.embedding_dim), np.float32), torch.empty(batch, config.embedding_dim)
    turn = {"kernel": 0, "threads": 0, "eager": 0, "floor": 0}

    def next_of(name: str) -> int:
        turn[name] = (turn[name] + 1) % draws
        return turn[name]

    def kernel(ids_B: Any, out_BD: Any) -> None:
        scheme.lookup(config, contender.arrays, ids_B, out_BD)

    floor, per_id = _floor(contender, ids_tensors, out)
    runs = {
        "kernel": lambda: kernel(ids[next_of("kernel")], out),
        "eager": lambda: scheme.lookup_reference(config, contender.tensors, ids_tensors[next_of("eager")], out_tensor),
        "floor": lambda: floor(next_of("floor")),
    }
    if batch >= 8192:
        runs["threads"] = lambda: in_parts(num_cores(), kernel, ids[next_of("threads")], out)
    best = best_seconds(runs, rounds=rounds)
    return Row(
        scheme=scheme.name,
        kind=contender.kind,
        dtype=contender.dtype,
        dim=config.embedding_dim,
        batch=batch,
        num_embeddings=config.num_embeddings,
        table_bytes=contender.num_bytes,
        bytes_per_id=per_id,
        kernel_us=round(best["kernel"] * 1e6, 2),
        threads_us=round(best.get("threads", best["kernel"]) * 1e6, 2),
        eager_us=round(best["eager"] * 1e6, 2),
        floor_us=round(best["floor"] * 1e6, 2),
    )


def _floor(contender: Contender, ids: torch.Tensor, out: NDArray[np.float32]) -> tuple[Any, float]:
    """What the scheme is measured against, as a function of the batch's number, and the bytes one id reads."""
    from embstore.kernels.cpu.floor import gather_runs

    if contender.scheme.name in NETWORKS:
        shapes = products_made(contender.scheme, contender.config, contender.tensors, ids[0])
        pairs = [(torch.randn(left), torch.randn(right)) for left, right in shapes]
        made = [torch.empty((*a.shape[:-1], b.shape[-1])) for a, b in pairs]

        def multiply(_: int) -> None:
            for (a, b), c in zip(pairs, made, strict=True):
                torch.matmul(a, b, out=c)

        return multiply, float(sum(4 * b.numel() for _, b in pairs)) / ids.shape[1]
    some = ids[: max(4, 100_000 // ids.shape[1])]
    found = [lines_read(contender.scheme, contender.config, contender.tensors, batch) for batch in some]
    runs, memory = [runs_of(lines_BL) for lines_BL, _ in found], make_memory(found[0][1])
    return lambda i: gather_runs(memory, runs[i % len(runs)], out), bytes_read(found[0][0])
