"""What every scheme is: a config, a module that trains, a pure function that serves.

The promises that the contract test checks for each of them:

* `lookup(config, tensors, ids, out)` of what `export()` gives equals `forward(ids)`;
* composed vectors start with mean 0 and standard deviation `init_std`, whatever the scheme (comparisons between
  schemes are meaningless otherwise), `embedding_dim ** -0.5` unless given: vectors of about unit length;
* `num_bytes()` is what the tensors take on disk.

A scheme's file holds its Config, `start` (its parameters), `layout` (what is stored), `compose` (the formula, in
torch), `lookup_cpu` (the compiled loop over the same tensors), `from_budget` and, where a better way than gradient
descent is known, `solve`.
"""

# Shapes: B ids in a batch, D embedding_dim, N num_embeddings.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embstore.errors import ConfigError, IdOutOfRange
from embstore.kernels import Array
from embstore.kernels.reference import write
from embstore.quantize import TensorSpec, packed_layout, take

MAX_IDS = (1 << 63) - 1
MAX_DIM = 1 << 16

Tensors = Mapping[str, Array]
"""A scheme's stored tensors by name: numpy arrays (CPU) or torch tensors (any device), all of one kind."""

Rows = Callable[[Tensor, Tensor], Tensor]
"""`rows(weight, index)` is `weight[index]` as floats: differentiable in training, dequantising in serving."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class SchemeConfig:
    """What a manifest has to say so that stored tensors mean vectors; subclasses add their own sizes."""

    num_embeddings: int
    embedding_dim: int

    def __post_init__(self) -> None:
        self.require("num_embeddings", at_least=1, at_most=MAX_IDS)
        self.require("embedding_dim", at_least=1, at_most=MAX_DIM)

    def require(self, name: str, *, at_least: int, at_most: int | None = None) -> None:
        """ConfigError unless field `name` is an int within the bounds, both inclusive."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if value < at_least or (at_most is not None and value > at_most):
            bounds = f"at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
            raise ConfigError(f"{name} must be {bounds}, got {value}")

    def require_bool(self, *names: str) -> None:
        """ConfigError unless these fields are true or false."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def require_one_of(self, name: str, choices: Iterable[str]) -> None:
        """ConfigError unless field `name` is one of the choices."""
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def parameters(self) -> dict[str, Any]:
        """The fields beyond the two sizes every scheme has: what a manifest calls `parameters`."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.name not in ("num_embeddings", "embedding_dim")}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A scheme's line in docs/schemes.md: n ids of D float32 numbers, m shared rows."""

    vector: str
    stored: str
    """Bytes."""
    reads: str
    """Bytes an id."""
    ceiling: str
    """The compression ratio that no options pass."""
    unseen: str
    """What an id in range that training never saw gets."""


class Scheme(nn.Module):
    """Base of all schemes: any int tensor of ids in, `(*ids.shape, embedding_dim)` float32 out."""

    name: ClassVar[str]
    facts: ClassVar[Facts]
    Config: ClassVar[type[SchemeConfig]]
    uses: ClassVar[frozenset[str]] = frozenset()
    """What `from_budget` takes beside sizes: `frequencies` (float [N], how often each id occurs), `histories`
    (int64 [E, 2], pairs of id and what it occurred with), `vectors` (float [N, small], a cheap embedding)."""
    given_in_code: ClassVar[frozenset[str]] = frozenset()
    """Constructor arguments that are tensors beside those in `uses`: no config and no command line can say them."""
    by_rank: ClassVar[bool] = False
    """Whether ids with small numbers get more or share less: number them by falling frequency then."""
    tolerance: ClassVar[float] = 0.0
    """How far, relative to the largest number of a batch, two machines' vectors may differ: 0 where the arithmetic is
    the same everywhere, more where sums are taken in an order that depends on the processor."""
    config: SchemeConfig
    __signature__: ClassVar[Signature]
    """What `help` and `inspect.signature` show: the fields of Config and what `start` takes, by name."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = _signature(cls)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        """sparse: gradients of rows are sparse; init_std: standard deviation of the vectors at their start, None:
        `embedding_dim ** -0.5`; generator: of what is drawn; options: the fields of Config, and what `start` takes."""
        super().__init__()
        parameters = self.parameters_in(options)
        self.config = self.Config(num_embeddings=num_embeddings, embedding_dim=embedding_dim, **parameters)
        self.sparse = sparse
        rest = {name: value for name, value in options.items() if name not in parameters}
        self.start(target_std(embedding_dim, init_std), generator, **rest)

    @classmethod
    def parameters_in(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that are fields of Config."""
        return {field.name: options[field.name] for field in fields(cls.Config) if field.name in options}

    def start(self, std: float, generator: torch.Generator | None) -> None:
        """Make the parameters of `self.config`: composed vectors start with mean 0 and standard deviation `std`."""
        raise NotImplementedError

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
        return self.vectors(ids.long())  # arithmetic on ids in uint8 would wrap

    def vectors(self, ids: Tensor) -> Tensor:
        """The vectors of int64 ids that are in range, differentiable; training forms that differ override this."""
        return self.compose(self.config, self.tensors(), ids, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """The module's parameters and buffers by name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def export(self) -> tuple[SchemeConfig, dict[str, Tensor]]:
        """What is published: the config and the tensors of `layout(config)`, detached; training state stays behind."""
        return self.config, {name: tensor.detach() for name, tensor in self.tensors().items()}

    def networks(self) -> Iterable[nn.Parameter]:
        """Dense parameters that every id's vector depends on (layers, projections): trained with Adam, not row-wise."""
        return ()

    def penalty(self) -> Tensor | None:
        """What trainers add to the loss, if anything: what keeps a scheme in training near what it can store."""
        return None

    def end_of_epoch(self, epoch: int) -> None:
        """Trainers call this after each epoch (from 1 on): schemes that store choices look them over here."""

    @staticmethod
    def compose(config: Any, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """The scheme's formula over stored tensors: ids int64 of any shape in, `(*ids.shape, D)` out."""
        raise NotImplementedError

    @classmethod
    def lookup(cls, config: Any, tensors: Tensors, ids_B: Array, out_BD: Array) -> None:
        """Write vectors into `out_BD`: no state, no autograd, no randomness; rows of negative ids stay as they are."""
        if isinstance(out_BD, np.ndarray):
            cls.lookup_cpu(config, tensors, ids_B, out_BD)
        elif out_BD.is_cuda:
            cls.lookup_gpu(config, tensors, ids_B, out_BD)
        else:
            cls.lookup_reference(config, tensors, ids_B, out_BD)

    @staticmethod
    def lookup_cpu(config: Any, tensors: Tensors, ids_B: Array, out_BD: Array) -> None:
        """`lookup` over numpy arrays, compiled."""
        raise NotImplementedError

    @classmethod
    def lookup_gpu(cls, config: Any, tensors: Tensors, ids_B: Array, out_BD: Array) -> None:
        """`lookup` over CUDA tensors."""
        cls.lookup_reference(config, tensors, ids_B, out_BD)

    @classmethod
    def lookup_reference(cls, config: Any, tensors: Tensors, ids_B: Array, out_BD: Array) -> None:
        """`lookup` over torch tensors, by `compose`."""
        with torch.no_grad():
            write(out_BD, ids_B, lambda ids: cls.compose(config, tensors, ids, take))

    @classmethod
    def layout(cls, config: Any) -> dict[str, TensorSpec]:
        """Name -> shape and dtype of every stored tensor, known without building any of them."""
        raise NotImplementedError

    @classmethod
    def check_tensors(cls, config: Any, tensors: Mapping[str, Array]) -> None:
        """VerificationFailed unless the numbers that loops use as positions are in range: damage must not read memory.

        Called with numpy arrays of the layout's shapes and dtypes before a table is served.
        """

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Scheme:
        """The largest module of this scheme that stores at most `num_bytes`; ConfigError says what is the least.

        frequencies: float [N], how often each id occurs, for schemes that share out by it. The rest as constructed.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: SchemeConfig) -> Self:
        """A module of these sizes, freshly initialised."""
        return cls(**asdict(config))

    @classmethod
    def from_tensors(cls, config: SchemeConfig, tensors: Mapping[str, Tensor]) -> Self:
        """The module whose `export()` these are: it gives the same vectors, and can be trained on."""
        module = cls.from_config(config)
        module.load_state_dict(dict(tensors))
        return module

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """The module of at most `num_bytes` whose vectors are closest to the given ones.

        weights_N: how much each id's error counts (its popularity); None: all alike. By the scheme's `solve`, or by
        gradient descent where it has none. The options are those of `from_budget`.
        """
        num_embeddings, embedding_dim = vectors_ND.shape
        solved = cls.solve is not Scheme.solve
        # Gradient descent goes on from the start, so that has the vectors' size.
        given: dict[str, Any] = {} if solved else {"init_std": float(vectors_ND.std(correction=0)) or None}
        given |= {"frequencies": weights_N, "generator": generator} | options
        module = cls.from_budget(num_embeddings, embedding_dim, num_bytes, **given)
        assert isinstance(module, cls)
        if solved:
            module.solve(vectors_ND, weights_N, progress)
        else:
            from embstore.fitting import distill

            distill(module, vectors_ND, weights_N=weights_N, generator=generator, progress=progress)
        return module

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Set the parameters to those whose vectors are closest to the given ones, by a closed form or steps to it."""
        raise NotImplementedError

    def num_bytes(self, dtype: str = "float32") -> int:
        """Bytes of the stored tensors, which is their size on disk, with rows stored as `dtype`."""
        return sum(spec.num_bytes for spec in packed_layout(self.layout(self.config), dtype).values())

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


def _signature(scheme: type[Scheme]) -> Signature:
    """How a scheme is constructed, with `**options` spelt out: sizes, fields of Config, what `start` takes."""
    own = signature(scheme.__init__).parameters
    if "options" not in own or not hasattr(scheme, "Config"):
        return Signature([p for name, p in own.items() if name != "self"])
    keyword, common = Parameter.KEYWORD_ONLY, signature(Scheme.__init__).parameters
    found = {name: common[name] for name in ("num_embeddings", "embedding_dim")}
    for field in fields(scheme.Config):
        default = Parameter.empty if field.default is MISSING else field.default
        found.setdefault(field.name, Parameter(field.name, keyword, default=default, annotation=field.type))
    for parameters in (signature(scheme.start).parameters, own, common):
        found |= {name: p for name, p in parameters.items() if p.kind is keyword}
    return Signature(list(found.values()))


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


def only_budget(options: Mapping[str, Any], *sizes: str) -> None:
    """ConfigError when one of these sizes is given beside a budget."""
    for name in sizes:
        if name in options:
            raise ConfigError(f"give either a budget or {name}, not both")


def buckets_in(num_bytes: int, row_bytes: int, least_bytes: int, scheme: str) -> int:
    """How many rows fit a budget once `least_bytes` are spent; ConfigError when not even one does."""
    num_buckets = (num_bytes - least_bytes) // max(1, row_bytes)  # a width below 1 is for the config to refuse
    if num_buckets < 1:
        raise ConfigError(
            f"{scheme} cannot be stored in {num_bytes:,} bytes here: the least is {least_bytes + row_bytes:,}"
        )
    return int(num_buckets)
