"""pq: fits of given vectors, beside faiss."""

# Shapes: N ids, D embedding_dim.

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.fits import weighted_relative_error
from support.pq_cases import D, N, clustered, decoded, filled, fitted
from support.scheme_cases import same_bits, served
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting.product import balanced_axes, product_codes
from embstore.schemes import PQ

pytestmark = pytest.mark.slow

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
    """Two fits with one seed give the same bits."""
    vectors = clustered()
    options: dict[str, Any] = {"num_stages": 2, "rotation": True}
    first, again = (fitted(vectors, 4, 8, **options) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert same_bits(first.codebooks, again.codebooks)


def test_progress_is_told() -> None:
    """Progress is told after each part."""
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
    """Vectors that are all alike are fitted without error, with a rotation too."""
    vectors = torch.full((60, 8), 2.5)
    assert same_bits(decoded(fitted(vectors, 2, 4)), vectors)
    torch.testing.assert_close(decoded(fitted(vectors, 2, 4, rotation=True, num_stages=2)), vectors)
