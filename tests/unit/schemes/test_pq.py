"""Product quantisation: decoding against brute force, bytes, budgets, the training of codebooks."""

# Shapes: N num_embeddings, D embedding_dim, M parts, W columns of a part, S stages, K codes, B ids in a batch.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.pq_cases import D, N, clustered, filled, fitted
from support.scheme_cases import looked_up, same, same_bits, served

from embstore import open_store
from embstore.errors import ConfigError, VerificationFailed
from embstore.kernels.cpu import pq as cpu_pq
from embstore.schemes import PQ

pytestmark = pytest.mark.slow


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
    """Codewords of any storage are decoded as torch decodes them, in small batches and large ones."""
    sizes = {"num_parts": 3, "num_codes": 20, "num_stages": num_stages, "rotation": rotation}
    module = filled(PQ(90, 36, **sizes))
    for ids in (torch.arange(90), torch.tensor([89, 0, 7])):
        expected = looked_up(module, ids, dtype)
        assert same(served(module, ids, dtype), expected, PQ.tolerance if rotation else 0.0)


def test_negative_ids_keep_their_rows_in_every_kind_of_batch() -> None:
    """Rows of negative ids stay as they are: without rotation, rotated in a small batch and in a large one."""
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


# ---- bytes and budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_stages", "rotation"), [(1, False), (3, False), (1, True), (2, True)])
def test_bytes_are_the_formula_of_the_docstring(num_stages: int, rotation: bool) -> None:
    """A table takes n S M + 4 S K D (+ 4 D^2) bytes."""
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
    """The error names the ceiling 4 D / M: a byte an id and part is the least that codes take."""
    with torch.device("meta"):
        message = r"each id keeps 1 byte of codes; its ratio stays below 256$"
        with pytest.raises(ConfigError, match=message):
            PQ.from_budget(10**6, 64, 900_000)
        with pytest.raises(ConfigError, match=r"each id keeps 16 bytes of codes; its ratio stays below 16$"):
            PQ.from_budget(10**6, 64, 10**7, num_parts=16)
        with pytest.raises(ConfigError, match=r"each id keeps 32 bytes .* below 8$"):
            PQ.from_budget(10**6, 64, 10**7, num_parts=16, num_stages=2)


def test_sizes_that_are_given_stay() -> None:
    """num_parts, num_codes or both are kept where given; the budget decides the rest."""
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
    """ConfigError names the parameter and what it may be, from a budget too."""
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
