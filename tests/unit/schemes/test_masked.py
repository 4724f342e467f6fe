"""Masked widths: a network learns how many numbers an id of a frequency keeps; what it leaves is served."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, K blocks.

from __future__ import annotations

import copy
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import weighted_relative_error
from support.scheme_cases import same, same_bits, served

from embstore import open_store
from embstore.errors import ConfigError, DataError, IdOutOfRange
from embstore.kernels.cpu import masked as cpu_masked
from embstore.schemes import Masked
from embstore.schemes.parts.masked_learner import MaskedLearner, allowed_widths

N, D = 60, 19


def learner(num_bytes: int = 4 * 60 * 8, **options: Any) -> MaskedLearner:
    """A module that learns widths of 60 ids x 19."""
    module = Masked.from_budget(N, D, num_bytes, **({"num_blocks": 5} | options))
    assert isinstance(module, MaskedLearner)
    return module


def disturbed(module: MaskedLearner, seed: int, size: float = 2.0) -> MaskedLearner:
    """The module with networks as if trained: any widths at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in (module.hot, module.cold):
            for parameter in network.parameters():
                parameter.normal_(0, size, generator=generator)
    return module


def masks_of(config: Any) -> torch.Tensor:
    """The mask of every id, from the widths alone: [N, D]."""
    widths_N = torch.cat([torch.full((n,), w) for n, w in zip(config.block_sizes, config.block_widths, strict=True)])
    return (torch.arange(config.embedding_dim) < widths_N[:, None]).float()


# ---- what is served ---------------------------------------------------------------------------------------------


def test_all_widths_full_is_a_full_table() -> None:
    """The vectors are the stored numbers, bit for bit."""
    module = Masked(30, 8, block_sizes=(3, 27), block_widths=(8, 8))
    ids = torch.randint(30, (50,))
    assert same_bits(module(ids), module.values.reshape(30, 8)[ids])
    assert same_bits(served(module, ids), module.values.reshape(30, 8)[ids])


@settings(max_examples=25)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 35)), min_size=1, max_size=12),
    rotation=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_vector_is_a_masked_row(blocks: list[tuple[int, int]], rotation: bool, seed: int) -> None:
    """For any blocks: brute-force masks over full rows (times R) give what is stored cut and served."""
    sizes, widths = zip(*blocks, strict=True)
    n, generator = sum(sizes), torch.Generator().manual_seed(seed)
    module = Masked(n, 35, block_sizes=sizes, block_widths=widths, rotation=rotation)
    mask_ND = masks_of(module.config)
    weight_ND = torch.randn(n, 35, generator=generator) * mask_ND
    rotation_DD = torch.randn(35, 35, generator=generator)
    values = weight_ND[mask_ND.bool()]
    module.load_state_dict({"values": values} | ({"rotation": rotation_DD} if rotation else {}))
    expected_ND = weight_ND @ rotation_DD if rotation else weight_ND + 0.0
    ids = torch.randint(n, (40,), generator=generator)
    assert same(module(ids), expected_ND[ids], 2e-6 if rotation else 0.0)
    assert same(served(module, ids), expected_ND[ids], 2e-6 if rotation else 0.0)


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 32, 50])
@pytest.mark.parametrize("rotation", [False, True])
def test_nothing_beside_a_row_is_read(dim: int, rotation: bool) -> None:
    """Rows between NaN, at the very end of the array too: not one of them shows; negative ids write nothing."""
    for width in {1, min(2, dim), dim // 2 + 1, dim}:
        array = np.full((1, 5 * width + 40), np.nan, np.float32)
        array[0, 40:] = np.arange(5 * width)
        ids, out = np.array([4, -1, 0, 2]), np.full((4, dim), np.float32(0.125))
        places = (np.array([5]), np.array([width]), np.array([40]))
        if rotation:
            cpu_masked.prefix_rotated(array, np.eye(dim, dtype=np.float32), *places, ids, out)
        else:
            cpu_masked.prefix(array, *places, ids, out)
        expected = np.zeros((4, dim), np.float32)
        expected[:, :width] = np.arange(5 * width).reshape(5, width)[ids]
        expected[1] = 0.125
        assert (out == expected).all()


def test_a_served_vector_does_not_depend_on_its_batch() -> None:
    """A vector has the same bits alone, repeated or among many, rotated too."""
    module = Masked(60, 24, block_sizes=(5, 15, 40), block_widths=(24, 16, 6), rotation=True)
    alone = torch.cat([served(module, torch.tensor([x])) for x in range(60)])
    ids = torch.randint(60, (400,))
    assert same_bits(served(module, ids), alone[ids])


def test_every_block_starts_with_vectors_of_one_length() -> None:
    """Narrow rows have larger numbers: the mean square of a vector is the same in every block."""
    module = Masked(8000, 32, block_sizes=(2000,) * 4, block_widths=(32, 16, 5, 1), init_std=0.25)
    for vectors in module(torch.arange(8000)).detach().split(2000):
        assert abs(float(vectors.square().mean().sqrt()) / 0.25 - 1) < 0.1


def test_an_id_past_the_last_block_is_refused() -> None:
    """An id past the end has no row, in the served form and in the learning one."""
    for module in (Masked(10, 4, block_sizes=(3, 7), block_widths=(4, 2)), learner()):
        with pytest.raises(IdOutOfRange):
            module(torch.tensor([module.num_embeddings]))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"block_sizes": (3, 6)}, "block_sizes must sum to num_embeddings 10, got 9"),
        ({"block_widths": (5, 2)}, "block_widths must be at most embedding_dim, which is 4, got 5"),
        ({"block_widths": (4, 0)}, "block_widths must be whole numbers of at least 1"),
        ({"rotation": 1}, "rotation must be true or false, got 1"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError says which field is wrong and what it may be."""
    with pytest.raises(ConfigError, match=named):
        Masked(10, 4, **({"block_sizes": (3, 7), "block_widths": (4, 2)} | wrong))


# ---- what learns ------------------------------------------------------------------------------------------------


def test_learning_starts_at_the_power_laws_widths() -> None:
    """Before any step the budget is filled: widths fall with frequency, and no block could be wider in its place."""
    for num_bytes in (240, 400, 1000, 2000, 4000):
        module = learner(num_bytes)
        config = module.config
        assert config == module._start or sum(config.block_sizes) == N
        assert module.num_bytes() <= num_bytes
        assert [w for w, _ in pairwise((*config.block_widths, 0))] == sorted(config.block_widths, reverse=True)
        narrowest = min(s for s, w in zip(module._start.block_sizes, module._start.block_widths, strict=True) if w < D)
        left = num_bytes // 4 - module.num_bytes() // 4
        assert left < max(module._start.block_sizes), narrowest
    assert learner(4 * N * D).config.block_widths == (D,)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), num_bytes=st.integers(240, 4600), rotation=st.booleans(), size=st.floats(0, 20))
def test_what_learns_is_what_would_be_served(seed: int, num_bytes: int, rotation: bool, size: float) -> None:
    """Whatever the networks say: the export keeps the budget, widths fall with frequency, and its vectors are ours."""
    num_bytes += 4 * D * D * rotation
    module = disturbed(learner(num_bytes, rotation=rotation), seed, size)
    config, tensors = module.export()
    assert 4 * sum(t.numel() for t in tensors.values()) == module.num_bytes() <= num_bytes
    assert all(a > b for a, b in pairwise(config.block_widths))
    ids = torch.arange(N)
    rtol = 2e-6 if rotation else 0.0
    assert same(served(module, ids), module(ids), rtol)
    assert same(Masked.from_tensors(config, tensors)(ids), module(ids), rtol)
    if not rotation:
        assert same_bits(module(ids), module.weight * masks_of(config) + 0.0)


def test_widths_follow_frequency_in_any_order_of_ids() -> None:
    """The block whose ids occur most is the widest, wherever it stands."""
    counts = torch.tensor([1.0] * 20 + [100.0] * 20 + [10.0] * 20)
    module = learner(frequencies=counts)
    parts = counts.split(module._start.block_sizes)
    rates = [float(part.mean()) for part in parts]
    assert rates != sorted(rates, reverse=True)
    for seed in range(5):
        mask_ND = masks_of(disturbed(module, seed).config)
        widths = [int(part.sum(1)[0]) for part in mask_ND.split(module._start.block_sizes)]
        by_rate = [width for _, width in sorted(zip(rates, widths, strict=True), reverse=True)]
        assert by_rate == sorted(widths, reverse=True)


def test_the_gradient_is_the_softmaxs_straight_through() -> None:
    """A hand computation: dL/dm from the right sum, through the softmax at the chosen widths' logits, to the biases."""
    module = disturbed(learner(4 * N * D, temperature=0.7), seed=3, size=0.3)
    ids, factor = torch.randint(N, (200,)), torch.randn(200, D)
    (module(ids) * factor).sum().backward()

    sizes = module._start.block_sizes
    logits_KD = module.logits().detach().double()
    soft_KD = (logits_KD / 0.7).softmax(1)
    mask_grad_KD = torch.zeros(len(sizes), D, dtype=torch.float64)
    block_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for x, row in zip(ids, factor, strict=True):
        mask_grad_KD[block_N[x]] += row * module.weight[x].detach()
    choice_grad_KD = mask_grad_KD.cumsum(1)  # width j + 1 lights columns 0 .. j
    inner_K1 = (soft_KD * choice_grad_KD).sum(1, keepdim=True)
    logit_grad_KD = soft_KD * (choice_grad_KD - inner_K1) / 0.7
    share_K1 = module.feature.double().sigmoid()[:, None]
    torch.testing.assert_close(
        module.hot[2].bias.grad.double(), (share_K1 * logit_grad_KD).sum(0), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        module.cold[2].bias.grad.double(), ((1 - share_K1) * logit_grad_KD).sum(0), atol=1e-4, rtol=1e-4
    )
    seen_ND = masks_of(module.config) * torch.bincount(ids, minlength=N)[:, None].clamp_max(1)
    assert ((module.weight.grad != 0) == (seen_ND > 0)).all()


def test_the_penalty_is_what_is_asked_for_beyond_the_budget() -> None:
    """What the logits alone would choose over the budget, less one; 0 within it; its gradient asks for less."""
    module = learner(4 * N * 6)
    assert module.penalty().item() == 0
    with torch.no_grad():
        module.hot[2].bias.copy_(torch.linspace(0, 20, D))
        module.cold[2].bias.copy_(torch.linspace(0, 20, D))
    asked_K = module.logits().argmax(1) + 1
    assert asked_K.tolist() == sorted(asked_K.tolist(), reverse=True)
    expected = float(asked_K @ torch.tensor(module._start.block_sizes)) / (N * 6) - 1
    penalty = module.penalty()
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5
    penalty.backward()
    assert module.hot[2].bias.grad[-1] > 0 > module.hot[2].bias.grad[0]
    assert module.weight.grad is None
    assert module.num_bytes() <= 4 * N * 6
    optimiser = torch.optim.Adam(module.networks(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        module.penalty().backward()
        optimiser.step()
    assert module.penalty().item() < 0.1
    assert module.num_bytes() > 4 * N * 3
    with torch.no_grad():
        module.hot[2].bias.copy_(torch.linspace(0, -5000, D))
        module.cold[2].bias.copy_(torch.linspace(0, -5000, D))
    assert module.penalty().item() == 0
    assert module.config.block_widths == (1,)


def test_training_moves_columns_to_where_they_are_wanted() -> None:
    """A loss that wants the second block wide gets it full, at the cost of the others, within the same bytes."""
    module = learner(4 * N * 6)
    before = module.masks()[1].sum().item()
    optimiser = torch.optim.Adam(module.networks(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (module.penalty() - module.masks()[1].sum() + module.masks()[2:].sum()).backward()
        optimiser.step()
    assert before < D
    assert module.masks()[1].sum().item() == D
    assert module.num_bytes() <= 4 * N * 6


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), budget=st.integers(9, 60))
def test_the_widths_are_the_best_that_are_allowed(seed: int, budget: int) -> None:
    """Of all falling widths none that takes as few bytes scores more; where the best of all fit, it is they."""
    generator = np.random.default_rng(seed)
    scores_KD, sizes_K = generator.normal(size=(3, 5)), np.array([2.0, 3.0, 4.0])
    widths, price = allowed_widths(scores_KD, sizes_K, budget)

    def score(found: tuple[int, ...]) -> float:
        return float(sum(scores_KD[k, w - 1] for k, w in enumerate(found)))

    falling = [found for found in product(range(1, 6), repeat=3) if found[0] >= found[1] >= found[2]]
    taken = int(sizes_K @ widths)
    assert taken <= budget
    assert all(score(tuple(widths)) >= score(found) - 1e-9 for found in falling if int(sizes_K @ found) <= taken)
    best = max(falling, key=score)
    assert (price == 0) == (int(sizes_K @ best) <= budget)
    if price == 0:
        assert tuple(widths) == best


def test_a_learner_is_copied_and_restored_whole() -> None:
    """A deep copy and a state round trip give the same vectors and widths."""
    module = disturbed(learner(), seed=1)
    ids = torch.arange(N)
    twin = learner()
    twin.load_state_dict(module.state_dict())
    for other in (twin, copy.deepcopy(module)):
        assert other.config == module.config
        assert same_bits(other(ids), module(ids))
    text = repr(module)
    assert f"block_widths={module.config.block_widths}" in text
    assert f"num_bytes={module.num_bytes():,}" in text


def test_what_is_published_is_what_was_learned(tmp_path: Path) -> None:
    """The store serves the learner's vectors and knows nothing of networks; they train on as fixed widths."""
    module = disturbed(learner(), seed=2)
    open_store(tmp_path).publish("items", module)
    table = open_store(tmp_path).load("items")
    assert set(table.tensors) == {"values"}
    ids = torch.arange(N)
    assert same_bits(torch.from_numpy(table.lookup(np.arange(N))), module(ids))
    fixed = Masked.from_tensors(*module.export())
    fixed(ids).square().sum().backward()
    torch.testing.assert_close(fixed.values.grad, 2 * fixed.values.detach())


def test_sparse_gradients_reach_the_rows() -> None:
    """`sparse=True` keeps the gradient of the full rows sparse; the networks' are dense."""
    module = learner(sparse=True)
    module(torch.tensor([1, 5, 5])).sum().backward()
    assert module.weight.grad.is_sparse
    assert set(module.weight.grad.coalesce().indices()[0].tolist()) == {1, 5}
    assert all(parameter.grad is not None and not parameter.grad.is_sparse for parameter in module.networks())


def test_a_network_that_diverged_is_not_published() -> None:
    """NaN in the logits is an error, not some widths."""
    module = learner()
    with torch.no_grad():
        module.hot[2].bias.fill_(float("nan"))
    with pytest.raises(DataError, match="training diverged"):
        module.export()


def test_a_budget_below_one_number_an_id_names_the_ceiling() -> None:
    """The least bytes, the rotation counted, and the ratio that cannot be passed; bad options by name."""
    with pytest.raises(ConfigError, match=r"the least is 4,000, because each id keeps a number .* stays below 64"):
        Masked.from_budget(1000, 64, 3999)
    assert Masked.from_budget(1000, 64, 4000).config.block_widths == (1,)
    with pytest.raises(ConfigError, match="the least is 20,384"):
        Masked.from_budget(1000, 64, 20383, rotation=True)
    with pytest.raises(ConfigError, match="either a budget or block_sizes"):
        Masked.from_budget(1000, 64, 10**6, block_sizes=(1000,))
    with pytest.raises(ConfigError, match="num_blocks must be a whole number of at least 1, got 0"):
        Masked.from_budget(1000, 64, 10**6, num_blocks=0)
    with pytest.raises(ConfigError, match="hidden must be a whole number of at least 1, got 0"):
        Masked.from_budget(1000, 64, 10**6, hidden=0)
    with pytest.raises(ConfigError, match="temperature must be above 0, got 0"):
        Masked.from_budget(1000, 64, 10**6, temperature=0)


# ---- fit --------------------------------------------------------------------------------------------------------


def test_a_fit_keeps_the_columns_that_hold_most() -> None:
    """Of one block: as many columns as fit, cut from the vectors as they are."""
    vectors_ND = torch.randn(50, 12)
    module = Masked.fit(vectors_ND, 4 * 50 * 5, num_blocks=1)
    assert module.config.block_widths == (5,)
    assert torch.equal(module(torch.arange(50)), vectors_ND * (torch.arange(12) < 5))
    assert torch.equal(Masked.fit(vectors_ND, 4 * 50 * 12)(torch.arange(50)), vectors_ND)


def test_a_fit_with_rotation_is_the_truncated_svd() -> None:
    """Of one block: the error is what the left out singular values hold."""
    vectors_ND = torch.randn(80, 10, dtype=torch.float64) * torch.arange(10, 0, -1)
    module = Masked.fit(vectors_ND, 4 * (80 * 4 + 100), num_blocks=1, rotation=True)
    assert module.config.block_widths == (4,)
    left = torch.linalg.svdvals(vectors_ND)[4:].square().sum()
    error = (module(torch.arange(80)).double() - vectors_ND).square().sum().detach()
    assert float(error / left) == pytest.approx(1, abs=1e-5)


def test_a_rotation_lets_a_fit_lose_less() -> None:
    """On columns that are alike, at equal bytes, and more where ids weigh more."""
    mixing = torch.linalg.qr(torch.randn(16, 16)).Q
    vectors_ND = (torch.randn(600, 16) * 0.7 ** torch.arange(16)) @ mixing
    weights_N = 1 / torch.arange(1, 601).double()
    budget = 4 * 600 * 16 // 3
    errors = []
    for rotation in (False, True):
        module = Masked.fit(vectors_ND, budget, weights_N=weights_N, rotation=rotation)
        assert module.num_bytes() <= budget
        assert module.config.block_widths[0] > module.config.block_widths[-1]
        errors.append(weighted_relative_error(vectors_ND, module(torch.arange(600)).detach(), weights_N))
    assert errors[1] < 0.25
    assert errors[1] < 0.6 * errors[0]
    with pytest.raises(DataError, match="weights have shape"):
        Masked.fit(vectors_ND, budget, weights_N=torch.ones(3))
