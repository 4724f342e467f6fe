"""k-means in two levels."""

# Shapes: N vectors, K clusters, G groups, D dimensions.

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fits import planted, weighted_relative_error

from embstore.fitting.clusters import many_clusters, share_out


def test_two_levels_find_the_clusters_of_one() -> None:
    """Where one level would take too long, clusters are found in groups, with and without a last pass over all."""
    vectors_ND, cluster_N = planted(3000, 30, 8)
    told: list[tuple[str, int, int]] = []
    for affordable in (1e6, 0.0):
        generator = torch.Generator().manual_seed(0)
        centroids, labels = many_clusters(
            vectors_ND, 120, generator=generator, affordable=affordable, progress=lambda *words: told.append(words)
        )
        assert told.pop() == ("k-means in groups", 10, 10)
        assert centroids.shape == (120, 8)
        assert int(labels.max()) < 120
        assert weighted_relative_error(vectors_ND, centroids[labels]) < 0.05
        inside = {int(label): set(cluster_N[labels == label].tolist()) for label in labels.unique()}
        assert sum(len(clusters) == 1 for clusters in inside.values()) >= 0.9 * len(inside)


@given(
    want=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    most=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    total=st.integers(1, 60),
)
def test_shares_add_up(want: list[float], most: list[int], total: int) -> None:
    """At least one where there is room, at most as many as there is room for, and the sum asked for."""
    most_G = torch.tensor(most[: len(want)])
    least, room = int((most_G > 0).sum()), int(most_G.sum())
    if room == 0:
        return
    total = max(least, min(total, room))
    share_G = share_out(torch.tensor(want, dtype=torch.float64), most_G, total)
    assert int(share_G.sum()) == total
    assert ((share_G >= (most_G > 0).long()) & (share_G <= most_G)).all()
