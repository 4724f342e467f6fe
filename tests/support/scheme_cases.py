"""Every scheme in every kind there is of it, built small: what the contract tests walk through."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M a size that variants make their own sizes from.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.quantize import DTYPES, for_kernels, pack_tensors, packed_layout, to_torch
from embstore.schemes import SCHEMES, scheme_class

N, D, M = 53, 19, 7  # sizes that divide nothing: the last bucket, cache line and quotient are incomplete


def num_buckets(n: int, d: int, m: int) -> dict[str, Any]:
    """Most schemes: m is their num_buckets."""
    return {"num_buckets": m}


@dataclass(frozen=True)
class Variant:
    """How one kind of a scheme is built.

    options: constructor arguments that stay the same; size(n, d, m): those that depend on the sizes.
    dim_multiple: embedding_dim must be a multiple of it (and at least it).
    rtol: 0 where forward, torch lookup and compiled lookup are the same bits; else how far they may be apart,
    relative to the largest number.
    searched: `from_budget` chooses the largest num_buckets that fits, of 1 .. n.
    every_row_is_read: a batch of all ids gives every row of every parameter a gradient.
    std_tolerance: how far the vectors' standard deviation (and mean) may start from the one asked for, as a share.
    budget_options: arguments of `from_budget` where they differ from `options`.
    straight_through: float rows are trained that are published rounded; gradients are passed on as if they were not.
    """

    options: dict[str, Any] = field(default_factory=dict)
    size: Callable[[int, int, int], dict[str, Any]] = num_buckets
    dim_multiple: int = 1
    rtol: float = 0.0
    searched: bool = True
    every_row_is_read: bool = True
    std_tolerance: float = 0.1
    budget_options: dict[str, Any] | None = None
    straight_through: bool = False


def with_weights(n: int, d: int, m: int) -> dict[str, Any]:
    """Weight slots that grow with the rows."""
    return {"num_buckets": m, "num_weights": 2 * m}


def no_size(n: int, d: int, m: int) -> dict[str, Any]:
    """Schemes that have no size of their own."""
    return {}


def hot_and_cold(n: int, d: int, m: int) -> dict[str, Any]:
    """A third of m for hot ids, the rest for the others; every id hot where that is possible."""
    num_hot = n if m >= n else m // 3
    return {"num_hot": num_hot, "num_cold": max(m - num_hot, 0)}


def a_rank(n: int, d: int, m: int) -> dict[str, Any]:
    """A fourth of the columns, an even number where it can be."""
    return {"rank": max(1, d // 8 * 2)}


def two_blocks(n: int, d: int, m: int) -> dict[str, Any]:
    """m ids with the whole width (all, where there are no more), half of it for the rest."""
    if m >= n:
        return {"block_sizes": (n,), "block_widths": (d,)}
    return {"block_sizes": (m, n - m), "block_widths": (d, max(1, d // 2))}


def a_memory(n: int, d: int, m: int) -> dict[str, Any]:
    """As many floats as m rows."""
    return {"memory_size": m * d}


def a_network(n: int, d: int, m: int) -> dict[str, Any]:
    """2 m hashes, two hidden layers of about as many units; all even, which int4 asks for."""
    return {"num_hashes": 2 * m, "hidden": (2 * m, 2 * m + 2)}


def parts_of_four(n: int, d: int, m: int) -> dict[str, Any]:
    """Parts of four columns, m codes of each."""
    return {"num_parts": d // 4, "num_codes": m}


def a_third_hot(n: int, d: int, m: int) -> dict[str, Any]:
    """A third of m hot ids, all of them where m says so."""
    return {"num_hot": n if m >= n else m // 3}


VARIANTS: dict[str, dict[str, Variant]] = {
    "full": {"plain": Variant(size=no_size, searched=False)},
    "hash": {"mod": Variant(), "seed-0": Variant({"seed": 0}), "seed-large": Variant({"seed": 2**63 - 1})},
    "double_hash": {
        "sum": Variant(),
        "sum-tables": Variant({"num_hashes": 3, "shared_table": False, "seed": 5}),
        "sum-weighted": Variant({"num_weights": 11}),
        "concat": Variant({"op": "concat"}, dim_multiple=2),
        "concat-tables-weighted": Variant(
            {"op": "concat", "num_hashes": 4, "shared_table": False, "num_weights": 3}, dim_multiple=4
        ),
    },
    "frequency": {
        "mod": Variant(size=hot_and_cold, searched=False, budget_options={}),
        "hash": Variant({"seed": 3}, size=hot_and_cold, searched=False),
    },
    "mem_rec": {
        "default": Variant({"num_weights": 11}),
        "one-each": Variant(
            {"num_weights": 31, "num_hashes": 1, "num_weight_hashes": 1, "seed": 2**63 - 1}, every_row_is_read=False
        ),
        "share": Variant(size=with_weights, searched=False, budget_options={}),
    },
    "learned_hash": {"map": Variant()},
    "qr": {
        "mult": Variant(),
        "add": Variant({"op": "add"}),
        "concat": Variant({"op": "concat"}, dim_multiple=2),
        "mult-three": Variant({"num_partitions": 3}),
        "concat-crt-three": Variant({"op": "concat", "partition": "crt", "num_partitions": 3}, dim_multiple=3),
        "add-crt": Variant({"op": "add", "partition": "crt"}),
    },
    "path": {"default": Variant(rtol=1e-5, every_row_is_read=False)},
    "low_rank": {
        "offset": Variant(size=a_rank, rtol=2e-6, searched=False),
        "plain": Variant({"offset": False}, size=a_rank, rtol=2e-6, searched=False),
    },
    "mixed_dim": {"two-blocks": Variant(size=two_blocks, rtol=2e-6, searched=False)},
    "masked": {
        "prefix": Variant(size=two_blocks, searched=False),
        "rotation": Variant({"rotation": True}, size=two_blocks, rtol=2e-6, searched=False),
    },
    "robe": {
        "signs": Variant(size=a_memory, searched=False),
        "plain": Variant({"signs": False, "block_size": 5, "scale": 0.37}, size=a_memory, searched=False),
        "one-block": Variant(
            {"block_size": 2**31 - 1, "scale": 2.5, "table_index": 3, "seed": 2**63 - 1}, size=a_memory, searched=False
        ),
    },
    "lma": {
        "hashed": Variant(size=a_memory, searched=False),
        "three-keys": Variant({"keys_per_dim": 3, "seed": 2**63 - 1}, size=a_memory, searched=False),
    },
    "dhe": {
        "mish": Variant(size=a_network, searched=False, rtol=1e-5),
        "relu-gaussian": Variant(
            {"activation": "relu", "encoding": "gaussian", "seed": 7, "batch_norm": False},
            size=a_network,
            searched=False,
            rtol=1e-5,
            every_row_is_read=False,
        ),
    },
    "pq": {
        "parts": Variant(size=parts_of_four, searched=False, dim_multiple=4, budget_options={}),
        "stages": Variant({"num_stages": 2}, size=parts_of_four, searched=False, dim_multiple=4),
        "rotation": Variant(
            {"rotation": True},
            size=parts_of_four,
            searched=False,
            dim_multiple=4,
            rtol=2e-6,
            budget_options={"rotation": True, "end_to_end": False},
        ),
    },
    "mixed_precision": {
        "int8": Variant(size=a_third_hot, searched=False, straight_through=True),
        "int4": Variant({"bits": 4}, size=a_third_hot, searched=False, dim_multiple=2, straight_through=True),
    },
    "memcom": {
        "scale": Variant(),
        "bias": Variant({"bias": True}),
        "offset": Variant({"offset": True}),
        "bias-offset": Variant({"bias": True, "offset": True}),
    },
}


@dataclass(frozen=True)
class Case:
    """One variant of one scheme."""

    name: str
    variant: Variant

    @property
    def cls(self) -> Any:
        """The scheme's class."""
        return scheme_class(self.name)

    def dim(self, d: int) -> int:
        """The least embedding_dim from `d` on that this variant can have."""
        multiple = self.variant.dim_multiple
        return -(-max(d, 1) // multiple) * multiple

    def sizes(self, n: int, d: int, m: int) -> dict[str, Any]:
        """Constructor arguments that say how large the scheme is."""
        return self.variant.size(n, d, m)

    def build(self, n: int = N, d: int = D, m: int = M, **options: Any) -> Any:
        """A module fresh from its constructor, in eval mode."""
        d = self.dim(d)
        return self.cls(n, d, **self.sizes(n, d, m), **self.variant.options, **options).eval()

    def filled(self, n: int = N, d: int = D, m: int = M, **options: Any) -> Any:
        """A module as if trained: every parameter moved off its start."""
        module = self.build(n, d, m, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-1, 1)
        return module

    def budgeted(self, n: int, d: int, num_bytes: int, **options: Any) -> Any:
        """A module from a budget."""
        given = self.variant.options if self.variant.budget_options is None else self.variant.budget_options
        return self.cls.from_budget(n, d, num_bytes, **given, **options)

    def config(self, n: int, d: int, m: int) -> Any:
        """The config of `build`, from the module: derived fields are filled in."""
        return self.build(n, d, m).export()[0]

    def num_bytes(self, n: int, d: int, m: int) -> int:
        """Bytes of a configuration, from its layout alone."""
        layout = self.cls.layout(self.config(n, d, m))
        return sum(slot.num_bytes for slot in layout.values())


ALL = [
    (f"{name}-{label}", Case(name, variant))
    for name in SCHEMES
    for label, variant in VARIANTS.get(name, {"default": Variant()}).items()
]
CASES = [pytest.param(case, id=label) for label, case in ALL]
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def stored_arrays(module: Any, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    """What is on disk when the module is published with rows of `dtype`; ConfigError where it cannot be."""
    config, tensors = module.export()
    layout = type(module).layout(config)
    arrays = {
        name: tensor.detach().cpu().numpy().astype(layout[name].numpy_dtype, copy=False)
        for name, tensor in tensors.items()
    }
    return pack_tensors(arrays, layout, dtype)


def stored_tensors(module: Any, dtype: str = "float32", device: str = "cpu") -> dict[str, Tensor]:
    """The same as torch tensors on a device."""
    slots = packed_layout(type(module).layout(module.export()[0]), dtype)
    return {name: to_torch(array, slots[name].dtype).to(device) for name, array in stored_arrays(module, dtype).items()}


def served(module: Any, ids: Tensor, dtype: str = "float32") -> Tensor:
    """What the compiled lookup returns, over read-only tensors and ids."""
    tensors = {name: for_kernels(array) for name, array in stored_arrays(module, dtype).items()}
    ids_B = ids.cpu().numpy().astype(np.int64)
    ids_B.flags.writeable = False
    for array in tensors.values():
        array.flags.writeable = False
    out = np.full((len(ids_B), module.embedding_dim), np.nan, np.float32)
    type(module).lookup(module.export()[0], tensors, ids_B, out)
    return torch.from_numpy(out)


def looked_up(module: Any, ids: Tensor, dtype: str = "float32", device: str = "cpu") -> Tensor:
    """What the torch lookup returns, on a device."""
    out = torch.full((len(ids), module.embedding_dim), float("nan"), device=device)
    type(module).lookup(module.export()[0], stored_tensors(module, dtype, device), ids.long().to(device), out)
    return out.cpu()


def all_paths(module: Any, ids: Tensor | list[int]) -> list[Tensor]:
    """The vectors of ids by forward, by the torch lookup and by the compiled one."""
    tensor = torch.as_tensor(ids)
    return [module(tensor).detach(), looked_up(module, tensor), served(module, tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape and equal bits: NaN equals itself, -0.0 is not 0.0."""
    return a.shape == b.shape and torch.equal(a.detach().cpu().view(torch.int32), b.detach().cpu().view(torch.int32))


def same(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Equal bits, or within `rtol` of the largest number where sums are taken in another order."""
    if not rtol:
        return same_bits(a, b)
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.isnan().any() or b.isnan().any():
        return False
    return a.numel() == 0 or bool((a - b).abs().max() <= rtol * b.abs().max().clamp_min(1e-30))
