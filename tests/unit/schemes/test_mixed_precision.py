"""Mixed precision: hot rows as they are, cold rows as packing leaves them, in training rounded up or down at random."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, H hot ids.

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.scheme_cases import looked_up, same_bits, served
from torch import Tensor

from embstore import open_store
from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.quantize import dequantize, pack
from embstore.schemes import MixedPrecision
from embstore.schemes.mixed_precision import round_rows

pytestmark = pytest.mark.slow

N, D, H = 60, 16, 7
every_width = pytest.mark.parametrize("bits", [8, 4])


def module_of(bits: int = 8, num_hot: int = H, seed: int = 0, **options: Any) -> MixedPrecision:
    """A module of random rows, with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return MixedPrecision(N, D, num_hot=num_hot, bits=bits, generator=generator, **options)


def packed(rows: Tensor, bits: int) -> Tensor:
    """What the rows read back as from the packed layout."""
    return dequantize(torch.from_numpy(pack(np.ascontiguousarray(rows.detach().numpy()), f"int{bits}")))


# ---- what is served ---------------------------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("num_hot", [0, 1, H, N - 1, N])
def test_hot_rows_are_exact_and_cold_ones_packed(bits: int, num_hot: int) -> None:
    """In evaluation, without gradients, and by both lookups of the export."""
    module, ids = module_of(bits, num_hot), torch.arange(N).flip(0)
    rows = module.weight.detach()
    expected = rows.clone() if num_hot == N else torch.cat([rows[:num_hot], packed(rows[num_hot:], bits)])
    with torch.no_grad():
        assert same_bits(module(ids), expected[ids])
    module.eval()
    for vectors in (module(ids), looked_up(module, ids), served(module, ids)):
        assert same_bits(vectors, expected[ids])


@every_width
def test_torch_packs_the_same_bytes(bits: int) -> None:
    """The cold table is what torch.ops.quantized makes of the cold rows."""
    module = module_of(bits)
    operations = torch.ops.quantized
    prepack = operations.embedding_bag_byte_prepack if bits == 8 else operations.embedding_bag_4bit_prepack
    expected = prepack(module.weight.detach()[H:])
    found = module.export()[1]["cold"].view(torch.uint8)
    assert found.shape == expected.shape
    tail = 8 if bits == 8 else 4
    assert torch.equal(found[:, -tail:], expected[:, -tail:])
    assert torch.equal(found, expected) or (found[:, :-tail].int() - expected[:, :-tail].int()).abs().max() <= 1


@settings(max_examples=60)
@given(
    rows=arrays(np.float32, (3, 6), elements=st.floats(-3e4, 3e4, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 0.1])),
    bits=st.sampled_from([8, 4]),
)
def test_rounding_is_packing_and_reading_back(rows: Any, bits: int) -> None:
    """`round_rows` gives the bits that the packed layout gives, for constant rows, tiny and large ones."""
    tensor = torch.from_numpy(rows)
    assert same_bits(round_rows(tensor, bits), packed(tensor, bits))


@every_width
def test_all_hot_is_a_full_table(bits: int) -> None:
    """With num_hot = n nothing is rounded, in training neither."""
    module, ids = module_of(bits, num_hot=N), torch.arange(N)
    assert same_bits(module(ids), module.weight)


@every_width
@pytest.mark.parametrize("num_hot", [0, N])
def test_a_part_may_be_empty_on_disk(bits: int, num_hot: int, tmp_path: Path) -> None:
    """No hot rows, or no cold ones: published, checked, mapped and read."""
    module, store = module_of(bits, num_hot).eval(), open_store(tmp_path)
    store.publish("items", module)
    found = torch.from_numpy(store.load("items").lookup(np.arange(N)))
    assert same_bits(found, module(torch.arange(N)))


@every_width
def test_what_was_published_is_published_again(bits: int) -> None:
    """A module made of stored tensors gives the same vectors and the same bytes; training one row changes one row."""
    config, tensors = module_of(bits).export()
    for source in (
        MixedPrecision.from_tensors(config, tensors),
        copy.deepcopy(MixedPrecision.from_tensors(config, tensors)),
    ):
        again = source.export()[1]
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        source.eval()
        assert same_bits(source(torch.arange(N)), served(source, torch.arange(N)))
        with torch.no_grad():
            source.weight[H + 5, 3] += 0.7
        changed = (source.export()[1]["cold"] != tensors["cold"]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [5]
        assert same_bits(source(torch.arange(N)), served(source, torch.arange(N)))


# ---- training ---------------------------------------------------------------------------------------------------


@every_width
def test_rounding_at_random_is_right_on_average(bits: int) -> None:
    """The mean of many roundings is the number itself, and each of them is one of its two neighbours."""
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    if bits == 4:  # extremes that float16 holds exactly, so that the codes reach them
        rows[:, 0], rows[:, 1] = -4.0, 3.5
        rows = rows.clamp(-4.0, 3.5)
    step = (rows.amax(dim=1, keepdim=True) - rows.amin(dim=1, keepdim=True)) / (255 if bits == 8 else 15)
    noise, count = torch.Generator().manual_seed(0), 4000
    total, most = torch.zeros_like(rows, dtype=torch.float64), torch.zeros_like(rows)
    for _ in range(count):
        rounded = round_rows(rows, bits, torch.rand(rows.shape, generator=noise))
        total += rounded
        most = torch.maximum(most, (rounded - rows).abs())
    assert (most <= step * 1.001).all()
    assert ((total / count - rows).abs() <= 5 * 0.5 * step / count**0.5 + 1e-6).all()
    nearest = (round_rows(rows, bits) - rows).abs()
    assert float(nearest.max()) > float(10 * (total / count - rows).abs().max())  # rounding to the nearest is not


@every_width
def test_training_sees_another_rounding_each_time(bits: int) -> None:
    """Of cold rows only; the generator decides which; evaluation is always the same."""
    module, ids = module_of(bits), torch.arange(N)
    first, second = module(ids).detach(), module(ids).detach()
    assert same_bits(first[:H], module.weight[:H])
    assert not same_bits(first[H:], second[H:])
    again = module_of(bits)
    assert same_bits(again(ids), first)
    assert same_bits(again(ids), second)
    module.eval()
    assert same_bits(module(ids), module(ids))


@every_width
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_pass_the_rounding(bits: int, sparse: bool, training: bool) -> None:
    """Every row gets its ids' gradients, hot or cold, as if nothing had been rounded."""
    module = module_of(bits, sparse=sparse).train(training)
    ids = torch.tensor([[0, 5, 5], [N - 1, 0, 12]])
    upstream = torch.randn(2, 3, D)
    (module(ids) * upstream).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.is_sparse == sparse
    expected = torch.zeros(N, D).index_add_(0, ids.reshape(-1), upstream.reshape(-1, D))
    torch.testing.assert_close(module.weight.grad.to_dense(), expected)


@every_width
def test_updates_smaller_than_half_a_step_are_not_lost(bits: int) -> None:
    """A hundred updates of a hundredth of a step move what is served by a step; rounded after each they would not."""
    module = module_of(bits)
    with torch.no_grad():
        module.weight[H:, 0], module.weight[H:, 1] = -1.0, 1.0
        module.weight[H:, 2:].clamp_(-0.8, 0.8)
    step = 2 / (255 if bits == 8 else 15)
    ids = torch.arange(H, N)
    start = module.eval()(ids).detach()
    written_back = start.clone()
    module.train()
    for _ in range(100):
        (module(ids)[:, 2:] * (-0.01 * step)).sum().backward()
        with torch.no_grad():
            assert module.weight.grad is not None
            module.weight -= module.weight.grad
            written_back = packed(written_back + 0.01 * step * (torch.arange(D) >= 2), bits)
        module.zero_grad()
    moved = module.eval()(ids).detach() - start
    torch.testing.assert_close(moved[:, 2:].mean(), torch.tensor(step), rtol=0.05, atol=0)
    assert (moved[:, :2] == 0).all()
    assert float((written_back - start).abs().max()) < 0.1 * step


def test_a_copy_goes_on_where_the_original_was() -> None:
    """A copy has the rows and the generator's state: it rounds as the original from there on."""
    module, ids = module_of(), torch.arange(N)
    module(ids)
    twin = copy.deepcopy(module)
    assert same_bits(twin(ids), module(ids))


# ---- bytes and budgets ------------------------------------------------------------------------------------------


def test_bytes_are_the_formula_of_the_docstring() -> None:
    """A table takes 4 D num_hot bytes, and D + 8 or D / 2 + 4 for each of the others."""
    assert module_of(8).num_bytes() == 4 * D * H + (D + 8) * (N - H)
    assert module_of(4).num_bytes() == 4 * D * H + (D // 2 + 4) * (N - H)


def test_the_papers_share_is_hot_unless_told_otherwise() -> None:
    """Without num_hot 5% of the ids have float rows with 8 bits, 1% with 4."""
    assert MixedPrecision(1000, D).config.num_hot == 50
    assert MixedPrecision(1000, D, bits=4).config.num_hot == 10


@settings(max_examples=60)
@given(n=st.integers(1, 400), dim=st.integers(1, 40), bits=st.sampled_from([None, 8, 4]), share=st.floats(0.01, 1.2))
def test_hot_rows_get_what_is_left(n: int, dim: int, bits: int | None, share: float) -> None:
    """8 bits where they fit, else 4 (or those asked for), and as many hot ids as the budget then holds."""
    budget = int(share * 4 * n * dim) + 1
    if bits == 4 and dim % 2:
        with pytest.raises(ConfigError, match="embedding_dim must be even"):
            MixedPrecision.from_budget(n, dim, budget, bits=bits)
        return
    sizes = {8: dim + 8, 4: dim // 2 + 4}
    tried = [bits] if bits else [8] if dim % 2 else [8, 4]
    fitting = [
        (kind, num_hot)
        for kind in tried
        for num_hot in range(n, -1, -1)
        if 4 * dim * num_hot + sizes[kind] * (n - num_hot) <= budget
    ]
    if fitting:
        config = MixedPrecision.from_budget(n, dim, budget, bits=bits).config
        assert config.bits == fitting[0][0]
        if sizes[config.bits] < 4 * dim:
            assert config.num_hot == fitting[0][1]
        else:
            assert config.num_hot == n  # packing makes such short rows longer
    else:
        least = n * min(min(sizes[kind], 4 * dim) for kind in tried)
        with pytest.raises(ConfigError, match=f"the least is {least:,}, "):
            MixedPrecision.from_budget(n, dim, budget, bits=bits)


def test_a_budget_says_the_ceiling() -> None:
    """A budget that is too small is answered with the ceiling, 4 D / (D + 8) or 4 D / (D / 2 + 4)."""
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=r"the least is 36,000,000, 36 bytes an id; its ratio cannot pass 7\.11"):
            MixedPrecision.from_budget(10**6, 64, 10**7)
        with pytest.raises(ConfigError, match=r"the least is 72,000,000, 72 bytes an id; its ratio cannot pass 3\.56"):
            MixedPrecision.from_budget(10**6, 64, 5 * 10**7, bits=8)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_hot": -1}, f"num_hot must be at least 0 and at most {N}, got -1"),
        ({"num_hot": N + 1}, f"num_hot must be at least 0 and at most {N}, got {N + 1}"),
        ({"num_hot": 1.5}, "num_hot must be a whole number"),
        ({"bits": 6}, "bits must be 8 or 4, got 6"),
        ({"bits": True}, "bits must be 8 or 4, got True"),
        ({"bits": 4, "embedding_dim": 7}, "embedding_dim must be even, got 7; use 8 bits"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        MixedPrecision(**({"num_embeddings": N, "embedding_dim": D} | wrong))


def test_a_size_beside_a_budget_is_refused() -> None:
    """The budget says how many ids are hot."""
    with pytest.raises(ConfigError, match="either a budget or num_hot"):
        MixedPrecision.from_budget(N, D, 10**6, num_hot=3)


# ---- given vectors ----------------------------------------------------------------------------------------------


@every_width
def test_a_fit_is_the_vectors_rounded(bits: int) -> None:
    """The first ids are exact, the others as packing leaves them, whatever the weights say."""
    vectors, weights = torch.randn(N, D), torch.arange(N).float()
    module = MixedPrecision.fit(vectors, module_of(bits).num_bytes(), bits=bits, weights_N=weights)
    assert module.config.num_hot == H
    expected = torch.cat([vectors[:H], packed(vectors[H:], bits)])
    assert same_bits(served(module, torch.arange(N)), expected)


def test_numbers_that_are_none_are_refused() -> None:
    """NaN in given vectors, and in rows that diverged; numbers past what float16 holds in int4's scale."""
    vectors = torch.randn(N, D)
    vectors[17, 3] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity, first in row 17"):
        MixedPrecision.fit(vectors, 10**6)
    for bad in (float("nan"), float("inf")):
        module = module_of()
        with torch.no_grad():
            module.weight[30, 1] = bad
        with pytest.raises(DataError, match="NaN or infinity"):
            module.export()
    module = module_of(4)
    with torch.no_grad():
        module.weight[30, 1] = 1e6
    with pytest.raises(VerificationFailed, match="int4 holds numbers up to"):
        module.export()


def test_sizes_need_no_numbers() -> None:
    """On the meta device `export` says shapes and dtypes, of any number of ids."""
    with torch.device("meta"):
        for bits in (8, 4):
            config, tensors = MixedPrecision(10**10, 64, bits=bits).export()
            layout = MixedPrecision.layout(config)
            assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s.shape for n, s in layout.items()}
            assert {n: t.element_size() for n, t in tensors.items()} == {"hot": 4, "cold": 1}


def test_packed_rows_that_look_like_nan_in_another_layout_are_published(tmp_path: Path) -> None:
    """Codes of 15 side by side are the bits of a NaN float: what they are is the scheme's to say."""
    module = module_of(4)
    with torch.no_grad():
        module.weight[H:] = 1.0
        module.weight[H:, 0] = -1.0
    assert (module.export()[1]["cold"].view(torch.uint8)[:, 1:8] == 255).all()
    store = open_store(tmp_path)
    store.publish("items", module.eval())
    assert same_bits(torch.from_numpy(store.load("items").lookup(np.arange(N))), module(torch.arange(N)))
