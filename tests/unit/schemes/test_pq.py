"""Product quantisation: decoding against brute force and faiss, fits against faiss and by their own optimality."""

# Shapes: N num_embeddings, D embedding_dim, M parts, W columns of a part, S stages, K codes, B ids in a batch.

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.fits import weighted_relative_error
from support.scheme_cases import looked_up, same, same_bits, served
from torch import Tensor

from embstore import open_store
from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.fitting.product import balanced_axes, product_codes
from embstore.kernels.cpu import pq as cpu_pq
from embstore.schemes import PQ
from embstore.schemes.parts.pq_learner import PQLearner

N, D = 300, 16


def filled(module: Any, seed: int = 0) -> Any:
    """The module with codes and numbers drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1, generator=generator)
        module.codes.random_(0, module.config.num_codes, generator=generator)
    return module


def by_hand(module: Any) -> NDArray[np.float32]:
    """Every vector, codeword by codeword, before the rotation."""
    config, codes_NC = module.config, module.codes.numpy()
    books = module.codebooks.detach().numpy().reshape(config.num_stages, config.num_parts, config.num_codes, -1)
    vectors = []
    for codes_C in codes_NC:
        parts = []
        for part in range(config.num_parts):
            word = books[0, part, codes_C[part]]
            for stage in range(1, config.num_stages):
                word = word + books[stage, part, codes_C[stage * config.num_parts + part]]
            parts.append(word)
        vectors.append(np.concatenate(parts))
    return np.array(vectors)


def clustered(seed: int = 0, num_vectors: int = N, dim: int = D) -> Tensor:
    """Vectors around a few centres, with columns that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix_DD = torch.randn(dim, dim, generator=generator) * torch.arange(1, dim + 1).pow(-0.7)[:, None]
    centres = 2 * torch.randn(12, dim, generator=generator)
    which = torch.randint(12, (num_vectors,), generator=generator)
    return (torch.randn(num_vectors, dim, generator=generator) + centres[which]) @ mix_DD


def decoded(module: Any) -> Tensor:
    """All vectors, as they are served."""
    vectors: Tensor = module.eval()(torch.arange(module.num_embeddings)).detach()
    return vectors


def fitted(vectors: Tensor, num_parts: int, num_codes: int, **options: Any) -> PQ:
    """A fit of these sizes."""
    given = {"num_parts": num_parts, "num_codes": num_codes, "generator": torch.Generator().manual_seed(0)} | options
    return PQ.fit(vectors, 1 << 40, **given)


# ---- decoding ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    num_parts=st.integers(1, 9),
    width=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 11, 16]),
    num_stages=st.integers(1, 3),
    num_codes=st.sampled_from([1, 2, 37, 256]),
    seed=st.integers(0, 2**32),
)
def test_a_vector_is_its_codewords(num_parts: int, width: int, num_stages: int, num_codes: int, seed: int) -> None:
    """Codeword by codeword, stages added in their order: forward and both lookups, bit for bit."""
    sizes = {"num_parts": num_parts, "num_codes": num_codes, "num_stages": num_stages}
    module = filled(PQ(40, num_parts * width, **sizes), seed)
    ids = torch.randint(40, (25,), generator=torch.Generator().manual_seed(seed))
    expected = torch.from_numpy(by_hand(module))[ids]
    for vectors in (module(ids), looked_up(module, ids), served(module, ids)):
        assert same_bits(vectors, expected)


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(("num_parts", "width"), [(1, 6), (5, 4), (16, 2), (6, 8), (7, 3), (2, 32), (9, 1)])
def test_a_rotated_vector_is_rotated_alone_or_in_a_crowd(num_parts: int, width: int, num_stages: int) -> None:
    """The product with the matrix, and the same bits whether the codebooks are rotated or each vector is."""
    sizes = {"num_parts": num_parts, "num_codes": 16, "num_stages": num_stages, "rotation": True}
    module = filled(PQ(1000, num_parts * width, **sizes))
    exact = by_hand(module).astype(np.float64) @ module.rotation.detach().numpy()
    ids = torch.arange(1000)
    crowd = served(module, ids)
    assert same(crowd, torch.from_numpy(exact), PQ.tolerance)
    assert same_bits(torch.cat([served(module, part) for part in ids.split(3)]), crowd)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_packed_codebooks_are_read_as_torch_reads_them(dtype: str, rotation: bool, num_stages: int) -> None:
    """Codewords of any storage, in batches of either kind."""
    sizes = {"num_parts": 3, "num_codes": 20, "num_stages": num_stages, "rotation": rotation}
    module = filled(PQ(90, 36, **sizes))
    for ids in (torch.arange(90), torch.tensor([89, 0, 7])):
        expected = looked_up(module, ids, dtype)
        assert same(served(module, ids, dtype), expected, PQ.tolerance if rotation else 0.0)


def test_negative_ids_keep_their_rows_in_every_kind_of_batch() -> None:
    """Plain, rotated in a small batch, rotated in a large one."""
    module = filled(PQ(50, 8, num_parts=2, num_codes=4, rotation=True))
    codes, books = module.codes.numpy(), module.codebooks.detach().numpy()
    rotation = module.rotation.detach().numpy()
    for num_ids in (3, 40):
        ids = np.arange(num_ids)
        ids[::2] = -1
        for call in (
            lambda out, ids=ids: cpu_pq.gather_codes(books, codes, ids, out),
            lambda out, ids=ids: cpu_pq.gather_codes_rotated(books, codes, 2, rotation, ids, out),
        ):
            out = np.full((num_ids, 8), 7.5, np.float32)
            call(out)
            assert (out[::2] == 7.5).all()
            assert (out[1::2] != 7.5).all()


def test_codes_past_2_to_31_are_reached(tmp_path: Path) -> None:
    """A table of more ids than 32 bits count: its far end is read, by torch and by the loop."""
    num_ids = 2**31 + 5
    path = tmp_path / "codes"
    with path.open("wb") as file:
        file.truncate(num_ids)  # a file of holes: it takes no room
    codes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r+", shape=(num_ids, 1))
    ids = np.array([0, 2**24 + 1, 2**31 - 1, 2**31, num_ids - 1])
    codes[ids, 0] = np.arange(1, 6)
    books = np.arange(256, dtype=np.float32)[:, None]
    config = PQ.Config(num_embeddings=num_ids, embedding_dim=1, num_parts=1)
    out = np.empty((5, 1), np.float32)
    PQ.lookup(config, {"codes": codes, "codebooks": books}, ids, out)
    assert out[:, 0].tolist() == [1, 2, 3, 4, 5]
    result = torch.empty(5, 1)
    tensors = {"codes": torch.from_numpy(codes), "codebooks": torch.from_numpy(books)}
    PQ.lookup(config, tensors, torch.from_numpy(ids), result)
    assert result[:, 0].tolist() == [1, 2, 3, 4, 5]


# ---- faiss ------------------------------------------------------------------------------------------------------


def faiss_of(codebooks: NDArray[np.float32], dim: int, num_parts: int, bits: int = 8) -> Any:
    """faiss's quantiser with these codewords."""
    quantiser = faiss.ProductQuantizer(dim, num_parts, bits)
    faiss.copy_array_to_vector(np.ascontiguousarray(codebooks, np.float32).reshape(-1), quantiser.centroids)
    return quantiser


@pytest.mark.parametrize("num_parts", [1, 4, 16, 32])
def test_faiss_decodes_to_the_same_vectors(num_parts: int) -> None:
    """faiss.ProductQuantizer with these codebooks injected decodes these codes to the same bits."""
    module = filled(PQ(N, 64, num_parts=num_parts))
    oracle = faiss_of(module.codebooks.detach().numpy(), 64, num_parts)
    assert same_bits(torch.from_numpy(oracle.decode(module.codes.numpy())), served(module, torch.arange(N)))


def test_faiss_encodes_to_the_same_codes() -> None:
    """The nearest codewords that faiss finds, for vectors that were not fitted."""
    module = filled(PQ(N, 32, num_parts=4))
    vectors = torch.randn(500, 32)
    oracle = faiss_of(module.codebooks.detach().numpy(), 32, 4)
    assert torch.equal(module.encode(vectors), torch.from_numpy(oracle.compute_codes(vectors.numpy())))


def test_a_fit_is_as_good_as_faiss() -> None:
    """Within 3% of the error of faiss.ProductQuantizer, trained on the same vectors."""
    vectors = clustered(num_vectors=4000)
    oracle = faiss.ProductQuantizer(D, 4, 5)
    oracle.train(vectors.numpy())
    theirs = torch.from_numpy(oracle.decode(oracle.compute_codes(vectors.numpy())))
    ours = decoded(fitted(vectors, 4, 32))
    assert weighted_relative_error(vectors, ours) < 1.03 * weighted_relative_error(vectors, theirs)


# ---- fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_codes", [40, 41, 256])
def test_a_codeword_an_id_is_the_table(num_codes: int, weighted: bool) -> None:
    """K >= n: every vector comes back bit for bit, whatever it weighs."""
    vectors = clustered(num_vectors=40)
    weights = torch.arange(40).float() if weighted else None
    assert same_bits(decoded(fitted(vectors, 4, num_codes, weights_N=weights)), vectors)
    rotated = decoded(fitted(vectors, 4, num_codes, weights_N=weights, rotation=True))
    assert weighted_relative_error(vectors, rotated) < 1e-6


def gradient_of_codebooks(module: PQ, vectors: Tensor, weights: Tensor) -> Tensor:
    """How the weighted squared error still changes with the codewords."""
    module.double()
    error = (weights[:, None] * (vectors - module(torch.arange(len(vectors)))).square()).sum()
    return torch.autograd.grad(error / weights.sum(), module.codebooks)[0]


@pytest.mark.parametrize(("num_stages", "rotation"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_a_fit_ends_with_the_best_codewords_for_its_codes(num_stages: int, rotation: bool) -> None:
    """The gradient of the weighted error by the codewords is 0: no others are better."""
    vectors, weights = clustered(), 1 / torch.arange(1, N + 1).double()
    module = fitted(vectors, 4, 8, num_stages=num_stages, rotation=rotation, weights_N=weights)
    gradient = gradient_of_codebooks(module, vectors.double(), weights)
    assert float(gradient.abs().max()) < 1e-5 * float(vectors.std())


def test_popularity_decides_whose_error_counts() -> None:
    """Weighted by popularity, the popular ids come out better than from a fit of all alike."""
    vectors = clustered(num_vectors=2000)
    weights = 1 / torch.arange(1, 2001).double()
    plain, by_weight = decoded(fitted(vectors, 4, 16)), decoded(fitted(vectors, 4, 16, weights_N=weights))
    assert weighted_relative_error(vectors, by_weight, weights) < 0.95 * weighted_relative_error(
        vectors, plain, weights
    )


def test_ids_without_weight_still_get_their_nearest_codewords() -> None:
    """Weight 0 says that an error does not count, not that the id is not there."""
    vectors, weights = clustered(), torch.ones(N).double()
    weights[100:] = 0
    module = fitted(vectors, 4, 16, weights_N=weights)
    nearest = faiss_of(module.codebooks.detach().numpy(), D, 4, bits=4).compute_codes(vectors.numpy())
    low, high = nearest & 15, nearest >> 4  # faiss packs two codes of 4 bits
    assert torch.equal(module.codes[100:, 0::2], torch.from_numpy(low)[100:])
    assert torch.equal(module.codes[100:, 1::2], torch.from_numpy(high)[100:])


def test_a_learned_rotation_helps_and_is_a_rotation() -> None:
    """Correlated columns are quantised with far less error, and lengths stay what they are."""
    vectors = clustered(num_vectors=2000)
    module = fitted(vectors, 4, 16, rotation=True)
    torch.testing.assert_close(module.rotation @ module.rotation.T, torch.eye(D), atol=1e-5, rtol=0)
    plain = weighted_relative_error(vectors, decoded(fitted(vectors, 4, 16)))
    assert weighted_relative_error(vectors, decoded(module)) < 0.8 * plain


def test_principal_axes_are_shared_out_evenly() -> None:
    """Variances 8, 4, 2, 1 in two parts: 8 with 1 and 4 with 2, so that both products are 8."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(1000, 5, generator=generator, dtype=torch.float64))[0][:, 1:] * 1000**0.5
    columns = columns - columns.mean(dim=0)
    vectors = columns * torch.tensor([1.0, 8, 2, 4]).double().sqrt()
    axes = balanced_axes(vectors, torch.ones(1000).double(), 2)
    variances = (vectors @ axes.T).var(dim=0)
    assert sorted(variances[:2].round().tolist()) in ([1, 8], [2, 4])
    assert sorted(variances[2:].round().tolist()) in ([1, 8], [2, 4])


def test_stages_quantise_what_is_left() -> None:
    """Two stages of two parts are better than two parts, and than four parts, which take as many bytes of codes."""
    vectors = clustered(num_vectors=2000)
    two, four, staged = (
        weighted_relative_error(vectors, decoded(fitted(vectors, num_parts, 16, num_stages=num_stages)))
        for num_parts, num_stages in ((2, 1), (4, 1), (2, 2))
    )
    assert staged < 0.7 * two
    assert staged < 0.9 * four


def test_a_fit_is_the_generators() -> None:
    """The same seed, the same bits."""
    vectors = clustered()
    options: dict[str, Any] = {"num_stages": 2, "rotation": True}
    first, again = (fitted(vectors, 4, 8, **options) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert same_bits(first.codebooks, again.codebooks)


def test_progress_is_told() -> None:
    """A step a part."""
    told: list[tuple[str, int, int]] = []
    fitted(clustered(), 4, 8, progress=lambda *step: told.append(step))
    assert told == [("codebooks", part, 4) for part in (1, 2, 3, 4)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_no_numbers_are_refused(bad: float) -> None:
    """DataError names the row, in a fit and in encoding."""
    vectors = clustered()
    vectors[17, 3] = bad
    with pytest.raises(DataError, match="NaN or infinity, first in row 17"):
        fitted(vectors, 4, 8)
    with pytest.raises(DataError, match="vectors to encode hold NaN or infinity"):
        PQ(N, D, num_parts=4).encode(vectors)


def test_weights_and_sizes_that_do_not_fit_are_refused() -> None:
    """Weights of another length, columns that cannot be cut, a fit that would train."""
    with pytest.raises(DataError, match="weights have shape"):
        fitted(clustered(), 4, 8, weights_N=torch.ones(3))
    with pytest.raises(ConfigError, match="16 columns cannot be 5 parts of 8 codes each"):
        product_codes(clustered(), 5, 8)
    with pytest.raises(ConfigError, match="codes fixed"):
        fitted(clustered(), 4, 8, end_to_end=True)


def test_vectors_of_one_value_are_fitted() -> None:
    """Nothing varies: the error is 0, with a rotation too."""
    vectors = torch.full((60, 8), 2.5)
    assert same_bits(decoded(fitted(vectors, 2, 4)), vectors)
    torch.testing.assert_close(decoded(fitted(vectors, 2, 4, rotation=True, num_stages=2)), vectors)


# ---- bytes and budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_stages", "rotation"), [(1, False), (3, False), (1, True), (2, True)])
def test_bytes_are_the_formula_of_the_docstring(num_stages: int, rotation: bool) -> None:
    """n S M + 4 S K D (+ 4 D^2)."""
    module = PQ(N, D, num_parts=4, num_codes=50, num_stages=num_stages, rotation=rotation)
    assert module.num_bytes() == N * num_stages * 4 + 4 * num_stages * 50 * D + (4 * D * D if rotation else 0)


@settings(max_examples=60)
@given(
    n=st.integers(1, 3000),
    dim=st.integers(1, 48),
    num_stages=st.integers(1, 2),
    rotation=st.booleans(),
    share=st.floats(0.001, 1.2),
)
def test_a_budget_buys_the_most_bits(n: int, dim: int, num_stages: int, rotation: bool, share: float) -> None:
    """Of all parts and codes that fit, none says more bits of an id; fewer parts where bits are equal."""
    budget = int(share * 4 * n * dim) + 1
    fixed = 4 * dim * dim if rotation else 0
    best = max(
        (
            (round(num_stages * parts * np.log2(codes), 9), -parts, codes)
            for parts in range(1, dim + 1)
            if dim % parts == 0
            for codes in range(1, min(n, 256) + 1)
            if n * num_stages * parts + 4 * num_stages * codes * dim + fixed <= budget
        ),
        default=None,
    )
    options: dict[str, Any] = {"num_stages": num_stages, "rotation": rotation, "end_to_end": False}
    if best is None:
        least = n * num_stages + 4 * num_stages * dim + fixed
        with pytest.raises(ConfigError, match=f"the least is {least:,},"):
            PQ.from_budget(n, dim, budget, **options)
        assert PQ.from_budget(n, dim, least, **options).num_bytes() == least
    else:
        config = PQ.from_budget(n, dim, budget, **options).config
        assert (config.num_parts, config.num_codes) == (-best[1], best[2])


def test_a_budget_says_the_ceiling() -> None:
    """A byte an id and part is the least that codes take: 4 D / M."""
    with torch.device("meta"):
        message = r"each id keeps 1 byte of codes; its ratio stays below 256$"
        with pytest.raises(ConfigError, match=message):
            PQ.from_budget(10**6, 64, 900_000)
        with pytest.raises(ConfigError, match=r"each id keeps 16 bytes of codes; its ratio stays below 16$"):
            PQ.from_budget(10**6, 64, 10**7, num_parts=16)
        with pytest.raises(ConfigError, match=r"each id keeps 32 bytes .* below 8$"):
            PQ.from_budget(10**6, 64, 10**7, num_parts=16, num_stages=2)


def test_sizes_that_are_given_stay() -> None:
    """num_parts or num_codes or both: the budget decides the rest."""
    with torch.device("meta"):
        assert PQ.from_budget(10**5, 64, 10**6, num_parts=4).config.num_codes == 256
        config = PQ.from_budget(10**5, 64, 10**6, num_codes=16).config
        assert (config.num_parts, config.num_codes) == (8, 16)
        config = PQ.from_budget(10**5, 64, 10**6, num_parts=2, num_codes=3, end_to_end=False).config
        assert (config.num_parts, config.num_codes) == (2, 3)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_parts": 5}, "num_parts must divide embedding_dim, 16, got 5: use one of 1, 2, 4, 8, 16"),
        ({"num_parts": 0}, "num_parts must be at least 1 and at most 16, got 0"),
        ({"num_parts": 32}, "num_parts must be at least 1 and at most 16, got 32"),
        ({"num_parts": 4, "num_codes": 257}, "num_codes must be at least 1 and at most 256, got 257"),
        ({"num_parts": 4, "num_codes": 0}, "num_codes must be at least 1"),
        ({"num_parts": 4, "num_codes": True}, "num_codes must be a whole number"),
        ({"num_parts": 4, "num_stages": 0}, "num_stages must be at least 1"),
        ({"num_parts": 4, "rotation": 1}, "rotation must be true or false, got 1"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError names it, and what it may be; from a budget too."""
    with pytest.raises(ConfigError, match=named):
        PQ(N, D, **wrong)
    with pytest.raises(ConfigError, match=named):
        PQ.from_budget(N, D, 10**6, **wrong)


def test_options_of_training_are_for_training() -> None:
    """commitment without end_to_end is a mistake."""
    with pytest.raises(ConfigError, match="commitment is for training end to end"):
        PQ.from_budget(N, D, 10**6, end_to_end=False, commitment=0.1)
    with pytest.raises(ConfigError, match="commitment must be at least 0, got -1"):
        PQ.from_budget(N, D, 10**6, commitment=-1)


def test_a_code_that_names_no_codeword_is_not_served(tmp_path: Path) -> None:
    """A damaged or foreign table is refused before a loop reads past the codebooks."""
    module = PQ(N, D, num_parts=4, num_codes=9)
    PQ.check_tensors(module.config, {"codes": module.codes.numpy()})
    module.codes[123, 2] = 9
    with pytest.raises(VerificationFailed, match="array 'codes' names codeword 9 in row 123, there are 9 of a part"):
        PQ.check_tensors(module.config, {"codes": module.codes.numpy()})
    with pytest.raises(VerificationFailed, match="names codeword 9"):
        open_store(tmp_path).publish("items", module)


# ---- training the codebooks -------------------------------------------------------------------------------------


def test_codes_stay_and_codewords_learn() -> None:
    """Fine-tuning: a codeword's gradient is the sum of its ids' gradients, the codes are no parameters."""
    module = fitted(clustered(), 4, 8)
    assert {name for name, _ in module.named_parameters()} == {"codebooks"}
    gradient_BD = torch.randn(N, D)
    (module(torch.arange(N)) * gradient_BD).sum().backward()
    expected = torch.zeros(4, 8, 4)
    for part in range(4):
        expected[part].index_add_(0, module.codes[:, part].long(), gradient_BD[:, 4 * part : 4 * part + 4])
    assert module.codebooks.grad is not None
    torch.testing.assert_close(module.codebooks.grad, expected.flatten(0, 1))
    assert [id(p) for p in PQ(N, D, num_parts=4, rotation=True).networks()] != []
    assert list(module.networks()) == []


def learner(num_codes: int = 8, **options: Any) -> PQLearner:
    """A module that learns its codes, of rows as if trained for an epoch."""
    given: dict[str, Any] = {"num_parts": 4, "num_codes": num_codes, "generator": torch.Generator().manual_seed(0)}
    module = PQ.from_budget(N, D, 10**6, **(given | options))
    assert isinstance(module, PQLearner)
    with torch.no_grad():
        module.weight.copy_(clustered())
    return module


KINDS: list[dict[str, Any]] = [{}, {"num_stages": 2}, {"rotation": True}, {"rotation": True, "num_stages": 2}]


def test_the_first_epoch_is_a_full_tables() -> None:
    """Until codewords are fitted the model sees the rows themselves, and only they get a gradient."""
    module, ids = learner(), torch.randint(N, (5, 3))
    vectors = module(ids)
    assert same_bits(vectors, module.weight[ids])
    vectors.sum().backward()
    assert module.weight.grad is not None
    assert module.codebooks.grad is None
    assert float(module.penalty()) == 0


@pytest.mark.parametrize("options", KINDS)
def test_what_is_evaluated_is_what_is_published(options: dict[str, Any]) -> None:
    """Evaluation, both lookups of the export and a module made of it: the same vectors, the fit's at first."""
    module, ids = learner(**options), torch.arange(N)
    module.end_of_epoch(1)
    rtol = PQ.tolerance if options.get("rotation") else 0.0
    with torch.no_grad():
        while_training = module(ids)
    vectors = module.eval()(ids)
    assert same_bits(vectors, while_training)
    assert same(served(module, ids), vectors, rtol)
    assert same(looked_up(module, ids), vectors, rtol)
    assert same(PQ.from_tensors(*module.export())(ids), vectors, rtol)
    alone = torch.stack([module(torch.tensor(i)) for i in range(20)])
    assert same(alone, vectors[:20], rtol)
    assert weighted_relative_error(clustered(), vectors.detach()) < 0.6


@pytest.mark.parametrize("options", KINDS)
def test_rows_and_codewords_get_the_gradient(options: dict[str, Any]) -> None:
    """Straight through to the rows; the sum of their ids' gradients to the codewords; the penalty pulls rows alone."""
    module = learner(commitment=0.5, **options)
    module.end_of_epoch(1)
    ids = torch.tensor([3, 5, 5, 299])
    upstream = torch.randn(4, D)
    vectors = module.train()(ids)
    (vectors * upstream).sum().backward(retain_graph=True)
    expected = torch.zeros(N, D).index_add_(0, ids, upstream)
    assert module.weight.grad is not None
    assert module.codebooks.grad is not None
    torch.testing.assert_close(module.weight.grad, expected)
    fixed = PQ.from_tensors(*module.export())
    (fixed(ids) * upstream).sum().backward()
    torch.testing.assert_close(module.codebooks.grad, fixed.codebooks.grad)

    module.zero_grad()
    penalty = module.penalty()
    away = module.weight[ids] - vectors
    torch.testing.assert_close(penalty, 0.5 * away.square().sum(dim=1).mean())
    penalty.backward()
    pulled = torch.zeros(N, D).index_add_(0, ids, 2 * 0.5 * away.detach() / 4)
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, pulled)
    assert module.codebooks.grad is None


def test_only_rows_have_sparse_gradients() -> None:
    """A step touches the rows of its batch; the codebooks are small."""
    module = learner(sparse=True)
    module.end_of_epoch(1)
    module(torch.tensor([1, 2])).sum().backward()
    assert module.weight.grad is not None
    assert module.codebooks.grad is not None
    assert module.weight.grad.is_sparse
    assert not module.codebooks.grad.is_sparse


def test_an_evaluation_or_an_export_fits_what_was_not_fitted() -> None:
    """Without an end_of_epoch no random codewords are served: the first lookup without gradients fits them."""
    for first in (lambda m: m.export(), lambda m: m.eval()(torch.arange(3)), lambda m: m.end_of_epoch(1)):
        module = learner()
        assert not bool(module.get_buffer("fitted"))
        first(module)
        assert bool(module.get_buffer("fitted"))
        assert weighted_relative_error(clustered(), decoded(module)) < 0.6


def test_a_state_is_a_learners_all() -> None:
    """Rows, codebooks, whether they were fitted: another learner with the state goes on where this one was."""
    module, twin = learner(rotation=True), learner(rotation=True, generator=torch.Generator().manual_seed(5))
    module.end_of_epoch(1)
    twin.load_state_dict(module.state_dict())
    assert same_bits(decoded(twin), decoded(module))


def test_codewords_that_no_id_chose_move() -> None:
    """After an epoch, an unused codeword stands where rows were worst off; used ones stay."""
    module = learner()
    module.end_of_epoch(1)
    with torch.no_grad():
        module.codebooks[3] = 1e6  # the first part's fourth codeword: no row is near
    before = module.codebooks.detach().clone()
    error = weighted_relative_error(clustered(), decoded(module))
    module.train()(torch.arange(N))
    module.end_of_epoch(2)
    changed = (module.codebooks != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3]
    assert weighted_relative_error(clustered(), decoded(module)) < error


def test_an_epoch_without_a_batch_moves_nothing() -> None:
    """end_of_epoch called again, with nothing trained in between, leaves every codeword where it is."""
    module = learner()
    for epoch in (1, 2):
        module.end_of_epoch(epoch)
        module.train()(torch.arange(N))
    module.end_of_epoch(3)
    before = module.codebooks.detach().clone()
    module.end_of_epoch(3)
    assert same_bits(module.codebooks, before)


def test_frequencies_weigh_the_fit() -> None:
    """The codewords are fitted to popular ids first; a frequency is needed for every id."""
    frequencies = torch.zeros(N)
    frequencies[:20] = 1000
    module = learner(frequencies=frequencies)
    module.end_of_epoch(1)
    alike = learner()
    alike.end_of_epoch(1)
    rows = clustered()[:20]
    errors = [weighted_relative_error(rows, decoded(one)[:20]) for one in (module, alike)]
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(DataError, match="frequencies have shape"):
        learner(frequencies=torch.ones(3))


def test_training_end_to_end_finds_good_codes() -> None:
    """Rows, codes and codewords trained on a loss alone come close to a fit that is shown the vectors."""
    target = clustered()
    module = learner(num_codes=16)
    with torch.no_grad():
        module.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    for epoch in range(1, 21):
        for ids in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(50):
            loss = (module(ids) - target[ids]).square().sum(dim=1).mean() + module.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        module.end_of_epoch(epoch)
    best = weighted_relative_error(target, decoded(fitted(target, 4, 16)))
    assert weighted_relative_error(target, decoded(module)) < 1.3 * best


def test_rows_that_diverged_are_not_published() -> None:
    """NaN has no nearest codeword."""
    module = learner()
    module.end_of_epoch(1)
    with torch.no_grad():
        module.weight[7, 1] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity"):
        module.export()


def test_a_learner_without_numbers_has_its_sizes() -> None:
    """On the meta device `export` says shapes and dtypes, of any number of ids."""
    with torch.device("meta"):
        module = PQ.from_budget(10**10, 64, 10**12, rotation=True)
    config, tensors = module.export()
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s.shape for n, s in PQ.layout(config).items()}


def test_a_learner_is_copied_and_published(tmp_path: Path) -> None:
    """Between two steps of training too."""
    import copy

    module = learner()
    module.end_of_epoch(1)
    module(torch.arange(9)).sum().backward()
    assert same_bits(decoded(copy.deepcopy(module)), decoded(module))
    store = open_store(tmp_path)
    store.publish("items", module)
    assert same_bits(torch.from_numpy(store.load("items").lookup(np.arange(N))), decoded(module))
