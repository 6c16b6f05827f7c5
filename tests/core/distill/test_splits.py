"""What is held out: single queries or whole clusters, never a query on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.distill import evaluation, fitting
from core.distill.clustering import cluster
from core.distill.splits import split_clusters, split_rows
from core.errors import DataInvalid, SpecInvalid
from core.specs.clusterings import Groups, KMeans
from tests.core.distill._make import make_pairs


def test_equal_queries_stay_on_one_side() -> None:
    queries = np.random.default_rng(0).normal(size=(40, 3))[np.arange(100) % 40]

    train, held_out = split_rows(queries, seed=1, test_fraction=0.25)

    assert sorted([*train, *held_out]) == list(range(100))
    seen = {row.tobytes() for row in queries[train]}
    assert not any(row.tobytes() in seen for row in queries[held_out])
    assert len({row.tobytes() for row in queries[held_out]}) == 10


def test_queries_that_float32_does_not_tell_apart_are_equal() -> None:
    queries = np.random.default_rng(0).normal(size=(20, 3))
    queries[:, 0] = 0.0
    twins = np.concatenate([queries, queries * (1 + 1e-12)])
    twins[20:, 0] = -0.0

    train, held_out = split_rows(twins, seed=1, test_fraction=0.25)

    assert not set(train % 20) & set(held_out % 20)
    assert len(held_out) == 10


def test_one_distinct_query_cannot_be_split() -> None:
    with pytest.raises(DataInvalid, match="all rows are equal"):
        split_rows(np.ones((5, 3)), seed=0, test_fraction=0.2)
    with pytest.raises(SpecInvalid, match=r"test_fraction 1\.0"):
        split_rows(np.eye(3), seed=0, test_fraction=1.0)


@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_clusters_are_held_out_whole(labels: list[int], fraction: float, seed: int) -> None:
    cluster_of = np.array(labels)
    queries = np.random.default_rng(0).normal(size=(len(labels), 3))
    if len(set(labels)) < 2:
        with pytest.raises(DataInvalid, match="split 'cluster' needs 2"):
            split_clusters(queries, cluster_of, seed=seed, test_fraction=fraction)
        return

    train, held_out = split_clusters(queries, cluster_of, seed=seed, test_fraction=fraction)

    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert len(train) > 0
    assert len(held_out) > 0
    assert not set(cluster_of[train]) & set(cluster_of[held_out])
    again = split_clusters(queries, cluster_of, seed=seed, test_fraction=fraction)
    assert np.array_equal(held_out, again[1])
    least = min(np.bincount(cluster_of)[np.unique(cluster_of)])
    assert len(held_out) <= max(least, round(fraction * len(labels)))


def test_a_query_of_two_clusters_goes_where_its_first_row_goes() -> None:
    queries = np.random.default_rng(0).normal(size=(12, 3))
    queries[6:9] = queries[0:3]  # rows of cluster 1 with queries of cluster 0
    cluster_of = np.arange(12) // 6

    for seed in range(4):
        train, held_out = split_clusters(queries, cluster_of, seed=seed, test_fraction=0.5)
        seen = {row.tobytes() for row in queries[train]}
        assert not any(row.tobytes() in seen for row in queries[held_out])
        assert set(held_out) in ({0, 1, 2, 3, 4, 5, 6, 7, 8}, {9, 10, 11})


def test_a_model_split_by_cluster_never_saw_a_held_out_group() -> None:
    pairs = make_pairs()
    assert pairs.groups is not None
    model = fitting.fit(
        pairs, Groups(), seed=0, split="cluster", test_fraction=0.3, strength=3.0, temperature=0.1
    )
    groups = np.array(pairs.groups)

    assert model.manifest["split"] == "cluster"
    assert not set(groups[model.train_rows]) & set(groups[model.held_out_rows])
    rows, _ = evaluation.held_out(pairs, model)
    assert set(groups[rows]) <= set(groups[model.held_out_rows])


def test_strength_and_temperature_are_chosen_on_whole_clusters_too() -> None:
    pairs, clustering = make_pairs(), KMeans(max_clusters=6)
    prepared = fitting.prepare(pairs, clustering, seed=0, test_fraction=0.2, split="cluster")
    whole = cluster(pairs.targets, clustering, 0)
    assert not set(whole[prepared.train_rows]) & set(whole[prepared.held_out_rows])

    rest, hidden = fitting.inner(prepared, seed=0)

    assert not set(rest.cluster_of) & set(prepared.cluster_of[hidden])
    scores = fitting.score(prepared, 3.0, [0.1], seed=0)
    assert scores[0].hit1 > 0
