"""DHE: a network in place of a table (Kang et al., KDD 2021, arXiv 2010.10784).

An id is encoded as `num_hashes` (k) hashes and decoded by a network of L hidden layers:

    x0 = (u(hash_0(id)), .., u(hash_{k-1}(id)))
    xj = activation(W_j x + b_j)      j = 0 .. L - 1
    e  = W_L x + b_L                  no activation: vectors may point anywhere

`hash_j(id) = mix64(id, s_j)` with `s_j = mix64(j, seed)` as unsigned, and `u(h) = (2 (h >> 40) + 1 - 2^24) / 2^24`: the
high 24 bits as one of 2^24 numbers in (-1, 1), evenly spaced and symmetric about 0, all of them exact in float32.
`encoding = "gaussian"` makes pairs of them normal (Box & Muller): with v = (u + 1) / 2,

    sqrt(-2 ln v_{2i}) * (cos 2 pi v_{2i+1}, sin 2 pi v_{2i+1})

Training has batch normalisation between a hidden layer's product and its activation (`batch_norm`, on unless said
otherwise); a batch of one id is normalised by the running statistics. `export()` folds it into W_j and b_j, so what is
stored and served is a plain network; `from_tensors` gives such a network, which trains on without normalisation.

Stored: `weight_j` float32 [out, in] and `bias_j` float32 [1, out]: 4 sum (in + 1) out bytes, whatever the number of
ids: no ceiling on the ratio. Lookup: k hashes and 2 sum in * out operations an id; the weights are read once a batch,
so this is a scheme for large batches. A budget buys `num_layers` hidden layers (3) of one even width h, the largest
that fits, and as many hashes: k = h up to 1,024, the paper's number.

Every id has a vector of its own, seen or not. Vectors start with mean 0 and the asked standard deviation over ids
0 .. 1,023, which also give the running statistics their start: encodings of other ids are as random as theirs.
Products are summed in an order that depends on batch and processor: `tolerance` says how far vectors may differ.
"""

# Shapes: B ids, K num_hashes, H width of a layer, D embedding_dim, L hidden layers.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.hashing import MASK64, mix64, mix64_torch, seed_offset
from embstore.kernels import Loops
from embstore.quantize import TensorSpec, dequantize
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget

cpu_dhe, cuda_dhe = Loops("cpu.dhe"), Loops("cuda.dhe")
cpu_gather = Loops("cpu.gather")

ACTIVATIONS = ("mish", "relu")
ENCODINGS = ("uniform", "gaussian")
MAX_WIDTH = 1 << 16
MAX_SEED = (1 << 63) - 1
PAPER_HASHES = 1024
IDS_AT_START = 1024
MAX_LAYERS = 64
MAX_SCRATCH = 1 << 24
"""Floats between layers at any time: fewer ids at once where layers are very wide."""
IDS_AT_ONCE = 1024
"""A chunk of a lookup: large enough for the full rate of matrix products, small enough for its layers to be cached."""
IDS_AT_ONCE_GPU = 1 << 15
"""The same on a GPU, where it bounds the memory that layers take: 128 MB at a width of 1,024."""
MOMENTUM, EPS = 0.1, 1e-5
ADDS_NOTHING = -1
"""The seed whose offset is 0: for keys that have theirs in them already."""


@dataclass(frozen=True, kw_only=True)
class DHEConfig(SchemeConfig):
    """num_hashes: numbers an id is encoded as (k); hidden: widths of the hidden layers; activation: mish or relu;
    encoding: uniform or gaussian; seed: of the hashes."""

    num_hashes: int
    hidden: tuple[int, ...]
    activation: str = "mish"
    encoding: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_hashes", at_least=1, at_most=MAX_WIDTH)
        self.require("seed", at_least=0, at_most=MAX_SEED)
        if not isinstance(self.hidden, list | tuple) or not self.hidden:
            raise ConfigError(f"hidden must be the widths of at least one hidden layer, got {self.hidden!r}")
        if len(self.hidden) > MAX_LAYERS:
            raise ConfigError(f"hidden must be at most {MAX_LAYERS} layers, got {len(self.hidden)}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for width in self.hidden:
            if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MAX_WIDTH:
                raise ConfigError(f"hidden widths must be whole numbers from 1 to {MAX_WIDTH}, got {width!r}")
        self.require_one_of("activation", ACTIVATIONS)
        self.require_one_of("encoding", ENCODINGS)
        if self.encoding == "gaussian" and self.num_hashes % 2:
            raise ConfigError(
                f"a gaussian encoding takes hashes in pairs: num_hashes must be even, got {self.num_hashes}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of everything between id and vector: the encoding, the hidden layers, the vector."""
        return (self.num_hashes, *self.hidden, self.embedding_dim)


class DHE(Scheme):
    """Hashes of the id, decoded by a network."""

    name = "dhe"
    Config = DHEConfig
    tolerance = 1e-5
    facts = Facts(
        vector="a network over a thousand hashes of the id",
        stored="the network",
        reads="the network, once a batch",
        ceiling="none",
        unseen="a vector of its own",
    )
    config: DHEConfig

    def start(self, std: float, generator: torch.Generator | None, *, batch_norm: bool = True) -> None:
        """batch_norm: normalise while training; it is folded into the layers when the module is published."""
        if not isinstance(batch_norm, bool):
            raise ConfigError(f"batch_norm must be true or false, got {batch_norm!r}")
        config, self.batch_norm = self.config, batch_norm
        for j, (width_in, width_out) in enumerate(pairwise(config.widths)):
            kaiming = (2 / width_in) ** 0.5
            setattr(self, f"weight_{j}", normal((width_out, width_in), kaiming, generator=generator))
            setattr(self, f"bias_{j}", nn.Parameter(torch.zeros(1, width_out)))
            if batch_norm and j < len(config.hidden):
                setattr(self, f"gain_{j}", nn.Parameter(torch.ones(1, width_out)))
                self.register_buffer(f"mean_{j}", torch.zeros(width_out))
                self.register_buffer(f"var_{j}", torch.ones(width_out))
        self._scale_to(std)

    @torch.no_grad()
    def _scale_to(self, std: float) -> None:
        """Set the running statistics and the last layer so that vectors have mean 0 and this standard deviation."""
        x = encode(self.config, torch.arange(IDS_AT_START))
        last = len(self.config.hidden)
        for j in range(last):
            x = F.linear(x, self.get_parameter(f"weight_{j}"))
            if self.batch_norm:
                self.get_buffer(f"mean_{j}").copy_(x.mean(dim=0))
                self.get_buffer(f"var_{j}").copy_(x.var(dim=0))
                x = (x - x.mean(dim=0)) / (x.var(dim=0) + EPS).sqrt()
            x = activate(self.config, x)
        weight, bias = self.get_parameter(f"weight_{last}"), self.get_parameter(f"bias_{last}")
        vectors = F.linear(x, weight)
        mean_D = vectors.mean(dim=0)
        spread = (vectors - mean_D).square().mean().sqrt()
        factor = torch.where(spread > 0, std / spread, 1.0)  # no spread: every unit is dead, which only tiny layers are
        weight.mul_(factor)
        bias.sub_(mean_D * factor)

    def vectors(self, ids: Tensor) -> Tensor:
        """The network as it is trained: normalised by the batch in training, by the running statistics otherwise."""
        if not self.batch_norm:
            return network(self.config, dict(self.named_parameters()), ids)
        x = encode(self.config, ids.reshape(-1)).to(self.get_parameter("weight_0").dtype)
        last = len(self.config.hidden)
        for j in range(last):
            x = F.linear(x, self.get_parameter(f"weight_{j}"))
            by_batch = self.training and len(x) > 1
            mean, var = self.get_buffer(f"mean_{j}"), self.get_buffer(f"var_{j}")
            gain, bias = self.get_parameter(f"gain_{j}"), self.get_parameter(f"bias_{j}")
            x = activate(self.config, F.batch_norm(x, mean, var, gain[0], bias[0], by_batch, MOMENTUM, EPS))
        x = F.linear(x, self.get_parameter(f"weight_{last}"), self.get_parameter(f"bias_{last}")[0])
        return x.reshape(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def export(self) -> tuple[SchemeConfig, dict[str, Tensor]]:
        """The plain network: what normalises is folded into weights and biases, in float64."""
        tensors: dict[str, Tensor] = {}
        for j in range(len(self.config.widths) - 1):
            weight, bias = self.get_parameter(f"weight_{j}").detach(), self.get_parameter(f"bias_{j}").detach()
            if self.batch_norm and j < len(self.config.hidden):
                mean, var = self.get_buffer(f"mean_{j}").double(), self.get_buffer(f"var_{j}").double()
                factor = self.get_parameter(f"gain_{j}").double()[0] * (var + EPS).rsqrt()
                weight, bias = (weight.double() * factor[:, None]).float(), (bias.double() - mean * factor).float()
            tensors |= {f"weight_{j}": weight, f"bias_{j}": bias}
        return self.config, tensors

    def networks(self) -> Iterable[nn.Parameter]:
        """All there is."""
        return self.parameters()

    @staticmethod
    def compose(config: DHEConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = W_L activation(.. activation(W_0 encode(x) + b_0) ..) + b_L."""
        dense = {
            name: rows(tensor, torch.arange(len(tensor), device=tensor.device)) if name.startswith("weight") else tensor
            for name, tensor in tensors.items()
        }
        return network(config, dense, ids)

    @staticmethod
    def lookup_cpu(config: DHEConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = W_L activation(.. activation(W_0 encode(x) + b_0) ..) + b_L."""
        found_B = ids_B >= 0
        if found_B.all():
            _decode(config, tensors, ids_B, out_BD)
        elif found_B.any():
            vectors = np.empty((int(found_B.sum()), config.embedding_dim), np.float32)
            _decode(config, tensors, ids_B[found_B], vectors)
            out_BD[found_B] = vectors

    @classmethod
    def lookup_gpu(cls, config: DHEConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = W_L activation(.. activation(W_0 encode(x) + b_0) ..) + b_L."""
        layers = range(len(config.widths) - 1)
        weights = [dequantize(tensors[f"weight_{j}"]) for j in layers]
        offsets_K = _offsets_on(config.num_hashes, config.seed, out_BD.device)
        for ids_b, out_bD in zip(ids_B.split(IDS_AT_ONCE_GPU), out_BD.split(IDS_AT_ONCE_GPU), strict=True):
            x = cuda_dhe.encode(ids_b, offsets_K, gaussian=config.encoding == "gaussian")
            for j in layers:
                x = F.linear(x if j == 0 else activate(config, x), weights[j], tensors[f"bias_{j}"][0])
            cuda_dhe.put_found(x, ids_b, out_bD)

    @classmethod
    def layout(cls, config: DHEConfig) -> dict[str, TensorSpec]:
        """Weights and biases of every layer."""
        slots: dict[str, TensorSpec] = {}
        for j, (width_in, width_out) in enumerate(pairwise(config.widths)):
            slots |= {
                f"weight_{j}": TensorSpec((width_out, width_in), rows=True),
                f"bias_{j}": TensorSpec((1, width_out)),
            }
        return slots

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        num_hashes: int | None = None,
        num_layers: int = 3,
        **options: Any,
    ) -> Self:
        """`num_layers` hidden layers of the largest even width that fits; as many hashes, up to 1,024, unless given."""
        only_budget(options, "hidden")
        if not 1 <= num_layers <= 64:
            raise ConfigError(f"num_layers must be from 1 to 64, got {num_layers}")
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)  # checked before they are used

        def config(half: int) -> DHEConfig:
            hashes = min(2 * half, PAPER_HASHES) if num_hashes is None else num_hashes
            return DHEConfig(
                num_embeddings=num_embeddings,
                embedding_dim=embedding_dim,
                num_hashes=hashes,
                hidden=(2 * half,) * num_layers,
            )

        def size(half: int) -> int:
            return sum(spec.num_bytes for spec in cls.layout(config(half)).values())

        if num_bytes < size(1):
            raise ConfigError(
                f"dhe cannot be stored in {num_bytes:,} bytes here: the least is {size(1):,}, "
                f"{num_layers} hidden layers of 2 units"
            )
        fits, too_large = 1, MAX_WIDTH // 2 + 1
        while too_large - fits > 1:
            half = (fits + too_large) // 2
            fits, too_large = (half, too_large) if size(half) <= num_bytes else (fits, half)
        found = config(fits)
        return cls(num_embeddings, embedding_dim, num_hashes=found.num_hashes, hidden=found.hidden, **options)

    @classmethod
    def from_tensors(cls, config: SchemeConfig, tensors: Mapping[str, Tensor]) -> Self:
        """The plain network, without normalisation: that is in the tensors already."""
        module = cls(**asdict(config), batch_norm=False)
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
        steps: int = 2000,
        **options: Any,
    ) -> Self:
        """Distilled by gradient descent, `steps` batches of 4,096 ids: about 3 * 4,096 lookups' work each."""
        from embstore.fitting import distill

        std = float(vectors_ND.std()) or None
        num_embeddings, dim = vectors_ND.shape
        start = {"init_std": std, "generator": generator}
        module = cls.from_budget(num_embeddings, dim, num_bytes, **(start | options))
        distill(module, vectors_ND, weights_N=weights_N, steps=steps, generator=generator, progress=progress)
        return module.eval()


@lru_cache(maxsize=64)
def _offsets(num_hashes: int, seed: int) -> NDArray[np.int64]:
    """What each hash adds to an id before mixing."""
    seeds_K = mix64(np.arange(num_hashes, dtype=np.int64), seed)
    return np.array([seed_offset(int(one) & MASK64) for one in seeds_K], np.int64)


@lru_cache(maxsize=64)
def _offsets_on(num_hashes: int, seed: int, device: torch.device) -> Tensor:
    """The same on a device, copied there once."""
    return torch.from_numpy(_offsets(num_hashes, seed)).to(device)


def encode(config: DHEConfig, ids: Tensor) -> Tensor:
    """The numbers that ids are known by: float32 `(*ids.shape, K)`."""
    offsets_K = torch.from_numpy(_offsets(config.num_hashes, config.seed)).to(ids.device)
    hashed = mix64_torch(ids[..., None] + offsets_K, ADDS_NOTHING)
    high = (hashed >> 40) & ((1 << 24) - 1)
    uniform = (2 * high - ((1 << 24) - 1)).float() * 2.0**-24
    if config.encoding == "uniform":
        return uniform
    v = (uniform + 1) * 0.5
    radius, angle = (-2 * v[..., 0::2].log()).sqrt(), 2 * torch.pi * v[..., 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)


def activate(config: DHEConfig, x: Tensor) -> Tensor:
    """The activation of hidden layers."""
    return F.mish(x) if config.activation == "mish" else F.relu(x)


def network(config: DHEConfig, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Vectors by the plain network."""
    last = len(config.hidden)
    x = encode(config, ids).to(tensors["weight_0"].dtype)
    for j in range(last):
        x = activate(config, F.linear(x, tensors[f"weight_{j}"], tensors[f"bias_{j}"][0]))
    return F.linear(x, tensors[f"weight_{last}"], tensors[f"bias_{last}"][0])


def _decode(config: DHEConfig, tensors: Tensors, ids_B: NDArray[np.int64], out_BD: NDArray[np.float32]) -> None:
    """Vectors of ids that are all there, in chunks; packed weights are unpacked once a call.

    The products are numpy's: on the machine measured its rate is torch's, and it takes read-only arrays. They use as
    many threads as the BLAS is told to (OPENBLAS_NUM_THREADS), whatever thread calls.
    """
    last, num_ids = len(config.hidden), len(ids_B)
    weights = [_floats(tensors[f"weight_{j}"], width) for j, width in enumerate(config.widths[:-1])]
    add_activation = cpu_dhe.add_mish if config.activation == "mish" else cpu_dhe.add_relu
    encode_into = cpu_dhe.encode_uniform if config.encoding == "uniform" else cpu_dhe.encode_gaussian
    offsets_K = _offsets(config.num_hashes, config.seed)
    at_once = max(1, min(num_ids, IDS_AT_ONCE, MAX_SCRATCH // sum(config.widths)))
    scratch = [np.empty((at_once, width), np.float32) for width in config.widths[:-1]]
    for start in range(0, num_ids, at_once):
        ids = ids_B[start : start + at_once]
        layers = [part[: len(ids)] for part in scratch]
        encode_into(ids, offsets_K, layers[0])
        for j in range(last):
            np.matmul(layers[j], weights[j].T, out=layers[j + 1])
            add_activation(layers[j + 1], tensors[f"bias_{j}"])
        vectors = out_BD[start : start + len(ids)]
        np.matmul(layers[last], weights[last].T, out=vectors)
        cpu_dhe.add_bias(vectors, tensors[f"bias_{last}"])


def _floats(table: Any, width: int) -> Any:
    """A table's rows as float32, whatever they are stored as."""
    if table.dtype == np.float32:
        return table
    rows = np.empty((len(table), width), np.float32)
    cpu_gather.gather(table, np.arange(len(table)), rows)
    return rows
