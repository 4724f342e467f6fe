"""The GPU's kernels: the same vectors as the formula in torch, one launch a lookup, nothing compiled in a request.

Where there is a CUDA device they run on it; elsewhere Triton's interpreter runs them on the CPU, which has to be asked
for before triton is first imported, so this file does when it is collected. No other test imports triton.
"""

# Shapes: B ids in a batch, D embedding_dim.

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.scheme_cases import CASES, Case, every_case, every_dtype, same, served, stored_tensors
from torch import Tensor

from embstore import hashing
from embstore.errors import ConfigError
from embstore.schemes import Hash, scheme_class
from embstore.schemes.base import MAX_IDS

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="triton exists for Linux alone")

pytestmark = [pytest.mark.slow, *([pytest.mark.gpu] if ON_GPU else [])]
DEVICE = "cuda" if ON_GPU else "cpu"
RTOL = 1e-6 if ON_GPU else 0.0
"""The kernels are compiled without fused multiply-add, but it is a GPU's compiler that keeps the promise."""
HIDDEN = 0.125
"""What rows of `out` hold that no kernel may touch."""


def looked_up(module: Any, ids: Tensor, dtype: str, lookup: str) -> Tensor:
    """What `lookup_gpu` or `lookup_reference` leaves in rows of HIDDEN."""
    config, tensors = module.export()[0], stored_tensors(module, dtype, DEVICE)
    out = torch.full((len(ids), module.embedding_dim), HIDDEN, device=DEVICE)
    getattr(type(module), lookup)(config, tensors, ids.to(DEVICE), out)
    return out.cpu()


def can_be_stored(module: Any, dtype: str) -> bool:
    """Whether there are rows that can be stored as `dtype`."""
    try:
        stored_tensors(module, dtype)
    except ConfigError:
        return False
    return True


def check(module: Any, dtype: str, rtol: float, batches: tuple[int, ...] = (33,)) -> None:
    """The kernel gives what the formula gives, and leaves the rows of negative ids."""
    n = module.num_embeddings
    ids = torch.tensor([n - 1, 0, -1, 3, 3, -(2**63), n - 2, *range(n // 2), 0, n - 1, -7])[:33]
    for batch in batches:
        got, expected = (looked_up(module, ids[:batch], dtype, f"lookup_{how}") for how in ("gpu", "reference"))
        assert same(got, expected, max(RTOL, rtol))
        assert (got[ids[:batch] < 0] == HIDDEN).all()


@every_case
@every_dtype
def test_the_kernel_gives_what_the_formula_gives(case: Case, dtype: str) -> None:
    """Every scheme, storage dtype and size of batch, with repeated ids."""
    module = case.filled(d=20 if dtype == "int4" else 19)
    if not can_be_stored(module, dtype):
        pytest.skip(f"{case.name} has no rows that get smaller as {dtype}")
    check(module, dtype, case.variant.rtol, batches=(33, 7, 1, 0))


@every_case
def test_vectors_wider_than_a_program_are_several_programs(case: Case) -> None:
    """Columns past the first block are those of the formula, of int8 rows too where a scheme can have them."""
    module = case.filled(n=7, d=150, m=5)
    dtype = "int8" if can_be_stored(module, "int8") else "float32"
    check(module, dtype, case.variant.rtol, batches=(7,))


SPECIAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "more hashes than are unrolled": ("double_hash", {"num_buckets": 5, "num_hashes": 11, "num_weights": 3}, "int8"),
    "many hashes side by side": ("double_hash", {"num_buckets": 5, "num_hashes": 10, "op": "concat"}, "float32"),
    "many tokens": ("mem_rec", {"num_buckets": 5, "num_weights": 9, "num_hashes": 9, "num_weight_hashes": 9}, "int4"),
    "two partitions side by side": ("qr", {"num_buckets": 8, "op": "concat"}, "int4"),
    "four partitions side by side": ("qr", {"num_buckets": 3, "num_partitions": 4, "op": "concat"}, "bfloat16"),
    "three coprime partitions": ("qr", {"num_buckets": 3, "num_partitions": 3, "partition": "crt"}, "int8"),
    "no partitions": ("qr", {"num_buckets": 3, "op": "concat", "threshold": 100}, "int8"),
    "no cold ids": ("frequency", {"num_hot": 53, "num_cold": 0}, "int8"),
    "no hot ids": ("frequency", {"num_hot": 0, "num_cold": 3, "seed": 1}, "int8"),
    "no cold rows": ("mixed_precision", {"num_hot": 53, "bits": 8}, "float32"),
    "no hot rows": ("mixed_precision", {"num_hot": 0, "bits": 4}, "float32"),
    "a block longer than its memory": ("robe", {"memory_size": 7, "block_size": 20}, "float32"),
    "a memory as long as a block": ("robe", {"memory_size": 20, "block_size": 20, "scale": 0.3}, "float32"),
    "blocks of one": ("robe", {"memory_size": 30, "block_size": 1, "signs": False}, "float32"),
    "three stages of codes": ("pq", {"num_parts": 4, "num_codes": 9, "num_stages": 3}, "int8"),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_kernels_have_no_special_sizes(special: str) -> None:
    """Empty parts, sizes that are one more than fits, and loops that take the place of unrolled code."""
    name, options, dtype = SPECIAL[special]
    module = scheme_class(name)(53, 20, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    check(module, dtype, 0.0)


def test_signs_of_a_long_block_are_all_of_its_words() -> None:
    """Past 64 columns a block of robe has its signs from further hashes."""
    check(scheme_class("robe")(53, 300, memory_size=1000, block_size=200), "float32", 0.0)


@every_case
def test_sums_are_taken_as_on_the_cpu(case: Case) -> None:
    """A table moved from CPU to GPU gives the same bits; but for networks, whose products are the platform's."""
    module = case.filled()
    ids = torch.arange(module.num_embeddings)
    tolerance = case.variant.rtol if case.name in ("dhe", "path") else 0.0
    assert same(looked_up(module, ids, "float32", "lookup_gpu"), served(module, ids), max(RTOL, tolerance))


def test_the_interpreter_is_what_runs_where_there_is_no_gpu() -> None:
    """Without a device the kernels are interpreted; with one they are compiled."""
    from embstore.kernels.cuda.gather import _gather

    assert type(_gather).__name__ == ("JITFunction" if ON_GPU else "InterpretedFunction")


@pytest.mark.parametrize("seed", [None, 0, 5, 2**63 - 1])
@pytest.mark.parametrize("num_buckets", [1, 7, 1000])
def test_ids_lead_where_integer_maths_says(seed: int | None, num_buckets: int) -> None:
    """Ids past 2^31 and up to 2^63 - 2 hash as in numpy: unsigned, 64 bits wide."""
    ids = np.array([0, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 3, 2**40, 2**53 + 1, 2**62, MAX_IDS - 1])
    module = Hash(MAX_IDS, 1, num_buckets=num_buckets, seed=seed)
    module.weight.data = torch.arange(num_buckets, dtype=torch.float32)[:, None]
    expected = ids % num_buckets if seed is None else hashing.bucket(ids, num_buckets, seed)
    assert looked_up(module, torch.from_numpy(ids), "float32", "lookup_gpu")[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_slice_of_a_larger_result_can_be_written(at: int) -> None:
    """`out` and `ids` may start anywhere: only their own rows are written."""
    module: Any = CASES[0].values[0].filled(d=3)  # type: ignore[attr-defined]
    ids = torch.tensor([7, 7, 5, -1, 0], device=DEVICE)
    out = torch.full((5, 3), HIDDEN, device=DEVICE)
    type(module).lookup_gpu(module.config, stored_tensors(module, "float32", DEVICE), ids[at:], out[at:])
    assert (out[:at] == HIDDEN).all()
    expected = [module(torch.tensor(i)).tolist() if i >= 0 else [HIDDEN] * 3 for i in ids[at:].tolist()]
    assert out[at:].tolist() == expected


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What compiling every lookup for a GPU said: this needs the compiler, not the GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "support.compile_kernels"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@every_case
def test_a_lookup_is_one_launch_or_two_for_networks(
    case: Case, compiled: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Launches of a lookup of 1,000 ids, for a Hopper GPU, with float32 and with int8 rows."""
    for dtype, said in compiled[request.node.callspec.id].items():
        assert said["launches"] == (2 if case.name in ("dhe", "path") else 1), dtype


@every_case
def test_no_request_compiles(case: Case, compiled: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """After one lookup (a table's golden ids) other batch sizes, odd addresses and one id alone find all compiled."""
    for dtype, said in compiled[request.node.callspec.id].items():
        assert said["compiled_later"] == 0, dtype
