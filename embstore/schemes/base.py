"""What every scheme is: a config, a module that trains, a pure function that serves.

The three promises that the contract test checks for each of them:

* `forward(ids)` equals `lookup(config, state_dict, ids, out)`;
* composed vectors start with mean 0 and standard deviation `init_std`, whatever the scheme (comparisons between
  schemes are meaningless otherwise), `embedding_dim ** -0.5` unless given: vectors of about unit length;
* `num_bytes()` is what the tensors take on disk.
"""

# Shapes: B ids in a batch, D embedding_dim.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embstore.errors import ConfigError, IdOutOfRange
from embstore.kernels import Array

MAX_IDS = (1 << 63) - 1

Tensors = Mapping[str, Array]
"""A scheme's state by name: numpy arrays (CPU) or torch tensors (any device), all of one kind."""


@dataclass(frozen=True, kw_only=True)
class SchemeConfig:
    """What a manifest has to say so that stored tensors mean vectors; subclasses add their own sizes."""

    num_embeddings: int
    embedding_dim: int

    def __post_init__(self) -> None:
        self.require("num_embeddings", at_least=1, at_most=MAX_IDS)
        self.require("embedding_dim", at_least=1)

    def require(self, name: str, *, at_least: int, at_most: int | None = None) -> None:
        """ConfigError unless field `name` is an int within the bounds, both inclusive."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if value < at_least or (at_most is not None and value > at_most):
            bounds = f"at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
            raise ConfigError(f"{name} must be {bounds}, got {value}")

    def parameters(self) -> dict[str, Any]:
        """The fields beyond the two sizes every scheme has: what a manifest calls `parameters`."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.name not in ("num_embeddings", "embedding_dim")}


class Scheme(nn.Module):
    """Base of all schemes: any int tensor of ids in, `(*ids.shape, embedding_dim)` float32 out."""

    name: ClassVar[str]
    Config: ClassVar[type[SchemeConfig]]
    config: SchemeConfig

    def __init__(self, config: SchemeConfig, *, sparse: bool = False) -> None:
        super().__init__()
        self.config = config
        self.sparse = sparse

    @property
    def num_embeddings(self) -> int:
        """Ids are `0 .. num_embeddings - 1`."""
        return self.config.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Floats in one vector."""
        return self.config.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of ids of any shape: `(*ids.shape, embedding_dim)`; raises IdOutOfRange before it reads a row."""
        self.check(ids)
        return self.compose(ids.long())  # arithmetic on ids in uint8 would wrap

    def compose(self, ids: Tensor) -> Tensor:
        """The scheme's formula, differentiable; ids are int64 and in range."""
        raise NotImplementedError

    @staticmethod
    def lookup(config: Any, tensors: Tensors, ids_B: Array, out_BD: Array) -> None:
        """Write vectors into `out_BD`: no state, no autograd, no randomness; rows of negative ids stay as they are."""
        raise NotImplementedError

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, num_bytes: int, **options: Any) -> Self:
        """The largest module of this scheme that stores at most `num_bytes`; ConfigError says what is the least."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: SchemeConfig) -> Self:
        """A module of these sizes, freshly initialised; `load_state_dict` fills it."""
        return cls(**asdict(config))

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor (float32), known without building any of them."""
        raise NotImplementedError

    def num_bytes(self) -> int:
        """Bytes of the stored tensors, which is their size on disk."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def check(self, ids: Tensor) -> None:
        """IdOutOfRange unless all ids are integers in `[0, num_embeddings)`: a bad id never reads a row."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be an integer tensor, got {ids.dtype}")
        if ids.numel() == 0:
            return
        low, high = (int(bound) for bound in ids.long().aminmax())
        if low < 0 or high >= self.num_embeddings:
            bad = low if low < 0 else high
            raise IdOutOfRange(f"id {bad} is outside [0, {self.num_embeddings})", id=bad)

    def rows(self, weight: Tensor, ids: Tensor) -> Tensor:
        """`weight[ids]` with the gradient kind chosen at construction (dense, or sparse rows)."""
        return F.embedding(ids, weight, sparse=self.sparse)

    def extra_repr(self) -> str:
        """What `print(module)` shows: the config, the bytes."""
        return ", ".join(f"{k}={v!r}" for k, v in asdict(self.config).items()) + f", num_bytes={self.num_bytes():,}"


def normal(
    shape: tuple[int, ...], std: float, *, mean: float = 0.0, generator: torch.Generator | None = None
) -> nn.Parameter:
    """A float32 parameter drawn from N(mean, std)."""
    return nn.Parameter(torch.empty(shape).normal_(mean, std, generator=generator))


def target_std(embedding_dim: int, init_std: float | None) -> float:
    """The standard deviation that composed vectors start with: given, or about unit length."""
    if init_std is None:
        return float(embedding_dim**-0.5)
    if not init_std > 0:
        raise ConfigError(f"init_std must be above 0, got {init_std}")
    return float(init_std)


def buckets_in(num_bytes: int, row_bytes: int, least_bytes: int, scheme: str) -> int:
    """How many rows fit a budget once `least_bytes` are spent; ConfigError when not even one does."""
    num_buckets = (num_bytes - least_bytes) // max(1, row_bytes)  # a width below 1 is for the config to refuse
    if num_buckets < 1:
        raise ConfigError(
            f"{scheme} cannot be stored in {num_bytes:,} bytes here: the least is {least_bytes + row_bytes:,}"
        )
    return int(num_buckets)
