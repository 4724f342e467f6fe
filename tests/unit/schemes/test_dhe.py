"""dhe: the encoding to the bit, the network within rounding, normalisation that folds away; the trainer's networks."""

# Shapes: B ids in a batch, K num_hashes, D embedding_dim, L hidden layers.

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from support.fits import weighted_relative_error
from support.scheme_cases import looked_up, same, same_bits, served
from torch import Tensor, nn

from embstore.common.config import build
from embstore.common.progress import Silent
from embstore.errors import ConfigError
from embstore.kernels.cpu import dhe as cpu_dhe
from embstore.schemes import DHE, Full, dhe
from embstore.schemes.dhe import DHEConfig
from embstore.train.config import TrainingConfig, load_config
from embstore.train.data import read_dataset
from embstore.train.loop import Examples, fit
from embstore.train.model import Factorisation
from embstore.train.optimizer import RowwiseAdagrad, TableOptimizer

pytestmark = pytest.mark.slow

WORD = 1 << 64
HUGE = [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**33 + 5, 2**40, 2**53 + 1, 2**62 - 1]


def mix(key: int, seed: int) -> int:
    """The 64-bit mixer in integers without limits."""
    z = (key + (seed + 1) * 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def config_of(num_hashes: int = 8, **options: Any) -> DHEConfig:
    return DHEConfig(num_embeddings=2**62, embedding_dim=3, num_hashes=num_hashes, **({"hidden": (4,)} | options))


def trained(module: DHE, steps: int = 20) -> DHE:
    """A module after some steps towards -1, statistics and all."""
    optimizer = torch.optim.Adam(module.networks(), 0.01)
    module.train()
    for _ in range(steps):
        vectors = module(torch.randint(module.num_embeddings, (32,)))
        (vectors + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


# ---- the encoding -----------------------------------------------------------------------------------------------


def encoded(config: DHEConfig, ids: list[int]) -> Tensor:
    """The compiled encoding."""
    out = np.empty((len(ids), config.num_hashes), np.float32)
    loop_ = cpu_dhe.encode_uniform if config.encoding == "uniform" else cpu_dhe.encode_gaussian
    loop_(np.array(ids), dhe._offsets(config.num_hashes, config.seed), out)
    return torch.from_numpy(out)


def test_encodings_are_the_committed_ones() -> None:
    """The numbers are part of the file format: odd multiples of 2^-24."""
    config = config_of(4, seed=7)
    for found in (dhe.encode(config, torch.tensor([0, 1, 2**40])), encoded(config, [0, 1, 2**40])):
        assert (found.double() * 2**24).tolist() == [
            [-13745263, 14435091, -13674931, 7147721],
            [-11979723, -7049777, 14422521, -9348833],
            [-6713011, -14980825, -12601459, -9346709],
        ]


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_encodings_are_those_of_integer_maths(seed: int) -> None:
    """Ids past 2^31, 2^53 and up to 2^62, by hand and exactly, in torch and compiled."""
    config = config_of(6, seed=seed)
    expected = [
        [(2 * (mix(id_, mix(j, seed)) >> 40) + 1 - 2**24) / 2**24 for j in range(config.num_hashes)] for id_ in HUGE
    ]
    assert dhe.encode(config, torch.tensor(HUGE)).tolist() == expected
    assert encoded(config, HUGE).tolist() == expected


def test_no_two_ids_are_encoded_alike() -> None:
    """Two hashes already tell 200,000 sequential ids, and their neighbours past 2^40, apart."""
    config = config_of(2)
    ids = torch.arange(100_000)
    found = dhe.encode(config, torch.cat([ids, ids + 2**40]))
    assert len(torch.unique(found, dim=0)) == 200_000


@pytest.mark.parametrize(("encoding", "std"), [("uniform", 3**-0.5), ("gaussian", 1.0)])
def test_encodings_are_spread_as_they_say(encoding: str, std: float) -> None:
    """Mean 0, the distribution's own spread and fourth moment, hashes uncorrelated; compiled within rounding."""
    config = config_of(16, encoding=encoding)
    found = dhe.encode(config, torch.arange(50_000)).double()
    assert float(found.mean().abs()) < 0.005
    assert float(found.std()) == pytest.approx(std, rel=0.005)
    kurtosis = float((found / std).pow(4).mean())
    assert kurtosis == pytest.approx(1.8 if encoding == "uniform" else 3.0, rel=0.02)
    correlation = torch.corrcoef(found.T) - torch.eye(16, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.025
    torch.testing.assert_close(encoded(config, list(range(100))).double(), found[:100], rtol=1e-5, atol=1e-6)


# ---- the network ------------------------------------------------------------------------------------------------


def by_hand(config: DHEConfig, tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The plain network in float64, one layer after the other."""
    x = dhe.encode(config, torch.tensor(ids)).double()
    for j in range(len(config.hidden) + 1):
        x = x @ tensors[f"weight_{j}"].double().T + tensors[f"bias_{j}"].double()
        if j < len(config.hidden):
            x = x * torch.tanh(torch.log1p(x.exp())) if config.activation == "mish" else x.clamp_min(0)
    return x


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("hidden", [(5,), (7, 9), (16, 4, 33)])
def test_every_lookup_is_the_network(activation: str, hidden: tuple[int, ...]) -> None:
    """forward, torch lookup and compiled lookup within `tolerance` of float64; no activation on the vectors."""
    module = trained(DHE(2**62, 6, num_hashes=12, hidden=hidden, activation=activation)).eval()
    config, tensors = module.export()
    expected = by_hand(config, tensors, HUGE)
    ids = torch.tensor(HUGE)
    for found in (module(ids), looked_up(module, ids), served(module, ids)):
        assert same(found.double(), expected, DHE.tolerance)
    assert (expected < -0.5).any()  # which no activation would let through


def test_the_activation_is_mish_everywhere() -> None:
    """From where it is 0 to where it is x, the compiled one is within 1e-6 of float64's, and never NaN."""
    x = np.concatenate([np.linspace(-130, 130, 100_001), [0.0, -0.0, 1e-30, -3e38, 3e38]]).astype(np.float32)[None]
    found = x.copy()
    cpu_dhe.add_mish(found, np.zeros_like(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found, wide * np.tanh(np.logaddexp(0, wide)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_chunks_and_missing_ids_change_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches longer than a chunk, with negative ids among them: each id's vector, the others' rows untouched."""
    monkeypatch.setattr(dhe, "IDS_AT_ONCE", 16)
    module = trained(DHE(1000, 6, num_hashes=24, hidden=(32,))).eval()
    for size in (1, 15, 16, 17, 33):
        ids = torch.randint(1000, (size,))
        assert same(served(module, ids, dtype), looked_up(module, ids, dtype), DHE.tolerance)
        ids[::3] = -1 - ids[::3]
        found = served(module, ids, dtype)
        assert found[ids < 0].isnan().all()
        assert same(found[ids >= 0], looked_up(module, ids[ids >= 0], dtype), DHE.tolerance)


# ---- normalisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_normalisation_folds_away(activation: str) -> None:
    """After training, in evaluation mode the module gives what its export gives: the fold is exact to rounding."""
    module = trained(DHE(1000, 8, num_hashes=16, hidden=(24, 20), activation=activation), steps=30).eval()
    assert float(module.get_buffer("var_1").std()) > 0
    config, tensors = module.export()
    assert set(tensors) == set(DHE.layout(config))
    plain = DHE.from_tensors(config, tensors)
    ids = torch.arange(1000)
    assert same(plain(ids), module(ids), 1e-6)
    assert not plain.batch_norm
    wide = module.double()
    torch.testing.assert_close(by_hand(config, tensors, list(range(1000))), wide(ids).detach(), rtol=1e-5, atol=1e-6)


def test_training_normalises_by_the_batch() -> None:
    """In training a batch decides the statistics and moves the running ones; in evaluation nothing moves."""
    module = DHE(1000, 8, num_hashes=16, hidden=(24,))
    with torch.no_grad():
        module.get_parameter("weight_0").mul_(10)
    ids = torch.arange(200)
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    x = dhe.encode(module.config, ids) @ module.get_parameter("weight_0").T
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + dhe.EPS).sqrt()
    hidden = torch.nn.functional.mish(normal)
    expected = hidden @ module.get_parameter("weight_1").T + module.get_parameter("bias_1")
    torch.testing.assert_close(module.train()(ids), expected, rtol=1e-4, atol=1e-5)
    moved = 0.9 * before["mean_0"] + 0.1 * x.mean(0)
    torch.testing.assert_close(module.get_buffer("mean_0"), moved.detach())
    after = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module.eval()(ids)
    assert all(torch.equal(after[name], tensor) for name, tensor in module.named_buffers())


def test_small_batches_train() -> None:
    """One id, none, the same id many times: running statistics or a variance of 0, never an error or NaN."""
    module = DHE(10, 4, num_hashes=8, hidden=(6,)).train()
    before = module.get_buffer("mean_0").clone()
    for ids in (torch.tensor([3]), torch.tensor(3), torch.empty(0, dtype=torch.int64)):
        vectors = module(ids)
        assert vectors.shape == (*ids.shape, 4)
        vectors.sum().backward()
    assert torch.equal(module.get_buffer("mean_0"), before)
    assert same_bits(module(torch.tensor([3])), module.eval()(torch.tensor([3])))
    assert module.train()(torch.full((5,), 3)).isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"batch_norm": False}, {"encoding": "gaussian"}, {"activation": "relu"}], ids=str
)
@pytest.mark.parametrize("hidden", [(64,), (2, 2), (48, 48, 48, 48)])
def test_vectors_start_at_the_asked_scale(options: dict[str, Any], hidden: tuple[int, ...]) -> None:
    """Mean 0 and std as asked, also over ids that did not take part in finding the scale, in both modes."""
    module = DHE(10**9, 32, num_hashes=64, hidden=hidden, init_std=0.3, **options)
    for ids in (torch.arange(1024), torch.arange(5000) + 10**8):
        for mode in (True, False):
            vectors = module.train(mode)(ids).detach().double()
            assert float(vectors.std()) == pytest.approx(0.3, rel=0.1)
            assert float(vectors.mean().abs()) < 0.03


# ---- sizes ------------------------------------------------------------------------------------------------------


def bytes_of(num_hashes: int, width: int, num_layers: int, d: int) -> int:
    return 4 * ((num_hashes + 1) * width + (num_layers - 1) * (width + 1) * width + (width + 1) * d)


@pytest.mark.parametrize(("d", "num_layers"), [(1, 1), (16, 1), (16, 3), (64, 5)])
def test_a_budget_buys_the_widest_network(d: int, num_layers: int) -> None:
    """To the byte, of even widths with as many hashes, up to 1,024; the next one would not fit."""
    for num_bytes in (bytes_of(2, 2, num_layers, d), 5_000, 20_001, 300_000, 30_000_000):
        with torch.device("meta") if num_bytes > 10**6 else torch.device("cpu"):
            module = DHE.from_budget(10**12, d, num_bytes, num_layers=num_layers)
        width = module.config.hidden[0]
        assert module.config.hidden == (width,) * num_layers
        assert module.config.num_hashes == min(width, 1024)
        assert module.num_bytes() == bytes_of(min(width, 1024), width, num_layers, d) <= num_bytes
        assert width % 2 == 0
        assert bytes_of(min(width + 2, 1024), width + 2, num_layers, d) > num_bytes
    least = bytes_of(2, 2, num_layers, d)
    with pytest.raises(ConfigError, match=re.escape(f"the least is {least:,}, {num_layers} hidden layers of 2 units")):
        DHE.from_budget(10, d, least - 1, num_layers=num_layers)


def test_a_budget_keeps_the_hashes_it_is_given() -> None:
    """num_hashes stays; a width beside a budget, or a depth that is none, is refused."""
    module = DHE.from_budget(100, 8, 50_000, num_hashes=32, num_layers=2, activation="relu", batch_norm=False)
    assert (module.config.num_hashes, module.config.activation, module.batch_norm) == (32, "relu", False)
    assert module.num_bytes() <= 50_000
    for options, named in (
        ({"hidden": (8,)}, "either a budget or hidden"),
        ({"num_layers": 0}, "num_layers must be from 1 to 64, got 0"),
        ({"num_hashes": 0}, "num_hashes must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=named):
            DHE.from_budget(100, 8, 50_000, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_hashes": 0}, "num_hashes must be at least 1 and at most 65536, got 0"),
        ({"hidden": ()}, r"at least one hidden layer, got \(\)"),
        ({"hidden": 8}, "at least one hidden layer, got 8"),
        ({"hidden": (8, 0)}, "hidden widths must be whole numbers from 1 to 65536, got 0"),
        ({"hidden": (8, True)}, "hidden widths must be whole numbers"),
        ({"activation": "gelu"}, "activation must be one of mish, relu, got 'gelu'"),
        ({"encoding": "normal"}, "encoding must be one of uniform, gaussian, got 'normal'"),
        ({"encoding": "gaussian", "num_hashes": 7}, "num_hashes must be even, got 7"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_norm": 1}, "batch_norm must be true or false, got 1"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter, its value and what it may be."""
    with pytest.raises(ConfigError, match=named):
        DHE(10, 4, **({"num_hashes": 8, "hidden": (4,)} | wrong))


def test_the_callers_widths_stay_the_callers() -> None:
    """A list of widths is read, not kept and not changed."""
    widths = [4, 6]
    module = DHE(10, 4, num_hashes=8, hidden=widths)  # type: ignore[arg-type]
    widths.append(9)
    assert module.config.hidden == (4, 6)


# ---- training ---------------------------------------------------------------------------------------------------


def test_a_fit_comes_closer_and_is_ready_to_serve() -> None:
    """Distillation lowers the error of a smooth target, keeps the budget, and ends in evaluation mode."""
    ids = torch.arange(200)
    centres, kind = torch.randn(4, 8), torch.arange(200) % 4
    vectors_ND = centres[kind] * 0.3
    module = DHE.fit(vectors_ND, 20_000, steps=150, num_layers=2, generator=torch.Generator().manual_seed(0))
    assert module.num_bytes() <= 20_000
    assert not module.training
    assert weighted_relative_error(vectors_ND, served(module, ids)) < 0.6


def test_networks_are_adams_and_tables_adagrads() -> None:
    """Each parameter is stepped once, by the optimiser and at the rate that its kind has; shared ones count once."""
    network, table = DHE(50, 4, num_hashes=4, hidden=(4,)), Full(50, 4, sparse=True)
    model = Factorisation(network, table)
    optimizer = TableOptimizer(model, model.tables().values(), 0.5, 0.25)
    adagrad, adam = optimizer.parts
    assert isinstance(adagrad, RowwiseAdagrad)
    assert isinstance(adam, torch.optim.Adam)
    assert {id(p) for p in adagrad.param_groups[0]["params"]} == {id(table.weight)}
    assert {id(p) for p in adam.param_groups[0]["params"]} == {id(p) for p in network.parameters()}
    assert (adagrad.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (0.5, 0.25)
    before = [p.detach().clone() for p in model.parameters()]
    users, items = model(torch.arange(20), torch.arange(20))
    (users * items).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    twin = Factorisation(network, network)
    (only,) = TableOptimizer(twin, twin.tables().values(), 0.5, 0.25).parts
    assert len(only.param_groups[0]["params"]) == len(list(network.parameters()))


class Watched(Full):
    """A full table that notes the mode it is used in and asks for something of its own."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.modes: list[bool] = []
        self.wanted = nn.Parameter(torch.tensor([5.0]))

    def vectors(self, ids: Tensor) -> Tensor:
        """The rows."""
        self.modes.append(self.training)
        return self.rows(self.weight, ids)

    def penalty(self) -> Tensor:
        """How far from 5 the number is."""
        return (self.wanted - 5.0).square().sum() + self.wanted.sum()


def test_epochs_train_and_judges_evaluate(tmp_path: Path) -> None:
    """Training mode in epochs, evaluation mode in validations and afterwards; a table's penalty is minimised too."""
    events = pl.DataFrame(
        {"user": [i // 5 for i in range(200)], "item": [i % 7 for i in range(200)], "time": range(200)}
    )
    events.write_parquet(tmp_path / "events.parquet")
    (tmp_path / "config.toml").write_text(
        '[data]\npath = "events.parquet"\nuser = "user"\nitem = "item"\ntime = "time"\n'
    )
    dataset = read_dataset(load_config(tmp_path / "config.toml").data, 0)
    training = TrainingConfig(max_epochs=2, batch_size=32)
    table = Watched(len(dataset.items), 8)
    model = Factorisation(DHE(len(dataset.users), 8, num_hashes=4, hidden=(8,)), table)
    validated: list[bool] = []
    modes_before = 0

    def validate() -> float:
        nonlocal modes_before
        assert all(table.modes[modes_before:])
        modes_before = len(table.modes)
        validated.append(model.training or table.training or model.user.training)
        return 0.1 * len(validated)

    result = fit(model, Examples(dataset, training, 0, torch.device("cpu")), training, validate, Silent())
    assert result.num_epochs == 2
    assert validated == [False, False]
    assert modes_before > 0
    assert not model.training
    assert not model.user.training
    assert float(table.wanted.detach()) < 5.0


def test_the_networks_rate_is_configured() -> None:
    """training.network_learning_rate is 0.001 unless given, and above 0."""
    assert TrainingConfig().network_learning_rate == 0.001
    assert TrainingConfig(network_learning_rate=0.5).network_learning_rate == 0.5
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"network_learning_rate must be a number [<>]"):
            build(TrainingConfig, {"network_learning_rate": bad}, "config.toml")
