from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

from core.distill.clustering import centroids, cluster, lloyd, merge_small, spanning_tree
from core.errors import DataInvalid, SpecInvalid
from core.specs.clusterings import Clustering, Groups, KMeans, Mst
from tests.core.distill._make import make_pairs, unit

METHODS: list[Clustering] = [
    KMeans(max_clusters=6, min_cluster_size=5),
    Mst(max_clusters=6, min_cluster_size=5),
    Groups(min_cluster_size=5),
]


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.method)
def test_clusters_are_numbered_by_first_row_large_enough_and_the_same_again(
    spec: Clustering,
) -> None:
    pairs = make_pairs()

    found = cluster(pairs.targets, spec, 3, pairs.groups)

    assert found.dtype == np.int64
    assert np.array_equal(found, cluster(pairs.targets, spec, 3, pairs.groups))
    _, first = np.unique(found, return_index=True)
    assert (np.diff(first) > 0).all()
    assert np.bincount(found).min() >= 5
    if not isinstance(spec, Groups):
        assert 1 < found.max() + 1 <= spec.max_clusters


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    distinct=st.integers(1, 40),
    clusters=st.integers(1, 12),
    least=st.integers(1, 6),
    method=st.sampled_from(["kmeans", "mst"]),
)
def test_any_shape_of_data_gives_valid_clusters(
    rows: int, distinct: int, clusters: int, least: int, method: str
) -> None:
    vectors = np.random.default_rng(rows).normal(size=(rows, 5))[np.arange(rows) % distinct]
    kind = KMeans if method == "kmeans" else Mst
    least = min(least, rows)

    found = cluster(vectors, kind(max_clusters=clusters, min_cluster_size=least), 0)

    sizes = np.bincount(found)
    assert len(found) == rows
    assert len(sizes) <= clusters
    assert sizes.min() >= least


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 60), seed=st.integers(0, 99))
def test_the_spanning_tree_is_as_short_as_scipys_over_all_distances(rows: int, seed: int) -> None:
    units = unit(np.random.default_rng(seed).normal(size=(rows, 4))).astype(np.float32)

    edges, lengths = spanning_tree(units)

    dense = np.triu(2 - units.astype(np.float64) @ units.T, 1)
    assert len(edges) == rows - 1
    assert (lengths + 1).sum() == pytest.approx(minimum_spanning_tree(dense).sum(), rel=1e-6)


def test_two_far_apart_heaps_are_what_the_tree_is_cut_into() -> None:
    rng = np.random.default_rng(0)
    heaps = np.repeat([[1.0, 0, 0], [0, 1.0, 0]], 10, axis=0) + 0.05 * rng.normal(size=(20, 3))

    found = cluster(heaps, Mst(max_clusters=2, min_cluster_size=3), 0)

    assert found.tolist() == [0] * 10 + [1] * 10


def test_groups_need_labels() -> None:
    with pytest.raises(DataInvalid, match="no groups column"):
        cluster(make_pairs().targets, Groups(), 0, None)
    with pytest.raises(DataInvalid, match="2 labels for 160 rows"):
        cluster(make_pairs().targets, Groups(), 0, ["a", "b"])


def test_a_least_size_above_the_rows_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="min_cluster_size 9"):
        cluster(np.eye(3), KMeans(min_cluster_size=9), 0)


def test_small_clusters_join_the_nearest_large_one() -> None:
    units = unit(np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0.9, 0.3]], dtype=np.float64))

    assert merge_small(units, np.array([0, 0, 1, 1, 2]), 2).tolist() == [0, 0, 1, 1, 0]
    assert merge_small(units, np.array([0, 1, 2, 3, 4]), 2).tolist() == [0] * 5


def test_centroids_are_means() -> None:
    vectors = np.arange(8.0).reshape(4, 2)
    assert centroids(vectors, np.array([0, 1, 0, 1]), 2).tolist() == [[2, 3], [4, 5]]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), rounds=st.integers(2, 7))
def test_kmeans_that_pauses_to_report_finds_the_same_clusters(seed: int, rounds: int) -> None:
    units = unit(np.random.default_rng(seed).standard_normal((400, 6))).astype(np.float32)
    told = []

    found = lloyd(units, 9, seed=seed, rounds=rounds, report=lambda: told.append(1))

    assert np.array_equal(found, lloyd(units, 9, seed=seed, rounds=300))
    assert 1 < len(told) < 300 / rounds, "it ends where nothing moves any more"


@pytest.mark.parametrize("spec", METHODS[:2], ids=lambda spec: spec.method)
def test_what_a_report_raises_ends_the_work(spec: Clustering) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cluster(make_pairs().targets, spec, 3, report=stop)
