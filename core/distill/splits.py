"""Which rows are fitted on and which are held out: by query, or whole clusters at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.distill.clustering import Report, cluster, unheard
from core.errors import DataInvalid, SpecInvalid
from core.specs.clusterings import Clustering
from core.specs.fitting import Split
from core.tensors.formats import Pairs
from core.tensors.shards import Array


@dataclass(frozen=True)
class TrainingRows:
    """The rows of pairs that are fitted on, clustered, and which rows are not."""

    queries: Array
    """[n, d] float32."""
    targets: Array
    """[n, d] float32."""
    groups: list[str] | None
    """[n] where the pairs have them."""
    cluster_of: Array
    """[n] int64, found among these rows alone."""
    train_rows: Array
    """[n] int64, rows of the pairs."""
    held_out_rows: Array
    """[h] int64."""


def training_rows(
    pairs: Pairs,
    clustering: Clustering,
    *,
    seed: int,
    test_fraction: float,
    split: Split,
    report: Report = unheard,
) -> TrainingRows:
    """Split the pairs and cluster the training targets.

    Split by ``cluster``, all targets are clustered first, only to say what is held out together;
    a model's own clusters are found among the training rows alone, as ever.

    Raises:
        DataInvalid: the pairs have no groups and are to be clustered by them, or are too few.
    """
    if split == "cluster":
        whole = cluster(pairs.targets, clustering, seed, pairs.groups, report=report)
        train, held_out = split_clusters(
            pairs.queries, whole, seed=seed, test_fraction=test_fraction
        )
    else:
        train, held_out = split_rows(pairs.queries, seed=seed, test_fraction=test_fraction)
    targets = pairs.targets[train].astype(np.float32)
    groups = None if pairs.groups is None else [pairs.groups[row] for row in train]
    return TrainingRows(
        queries=pairs.queries[train].astype(np.float32),
        targets=targets,
        groups=groups,
        cluster_of=cluster(targets, clustering, seed, groups, report=report),
        train_rows=train,
        held_out_rows=held_out,
    )


def split_rows(queries: Array, *, seed: int, test_fraction: float) -> tuple[Array, Array]:
    """Split rows into training and held-out; equal queries stay on one side.

    Queries are equal where float32, in which everything is computed, does not tell them apart.

    Args:
        queries: [n, d] floating.
        seed: of the permutation.
        test_fraction: of the distinct queries, in (0, 1); at least one on each side.

    Returns:
        Two ascending int64 arrays of row numbers.

    Raises:
        DataInvalid: fewer than two distinct queries.
    """
    _check(test_fraction)
    which, distinct = _numbers(queries)
    count = min(max(1, round(test_fraction * distinct)), distinct - 1)
    chosen = np.random.default_rng(seed).permutation(distinct)[:count]
    held_out = np.isin(which, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_clusters(
    queries: Array, cluster_of: Array, *, seed: int, test_fraction: float
) -> tuple[Array, Array]:
    """Hold out whole clusters: what is judged is of a sort that was never fitted on.

    Clusters are drawn in random order and taken as long as they fit into ``test_fraction`` of the
    distinct queries; where none does, the smallest is. Equal queries go where their first row goes.

    Args:
        queries: [n, d] floating.
        cluster_of: [n] int64 in [0, C), C >= 2.
        seed: of the order.
        test_fraction: of the distinct queries, in (0, 1); clusters are not cut, so about.

    Returns:
        Two ascending int64 arrays of row numbers, neither empty.

    Raises:
        DataInvalid: fewer than two clusters have a query of their own.
    """
    _check(test_fraction)
    which, distinct = _numbers(queries)
    first = np.full(distinct, len(queries))
    np.minimum.at(first, which, np.arange(len(queries)))
    home = cluster_of[first]  # [distinct]: the cluster of each distinct query
    sizes = np.bincount(home, minlength=int(cluster_of.max()) + 1)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    if len(order) < 2:
        raise DataInvalid(
            f"clustering: {len(order)} cluster with queries of its own; split 'cluster' needs 2 "
            "(allow more clusters, or split by query)"
        )
    room = round(test_fraction * distinct)
    taken: list[int] = []
    for number in order:
        if sizes[number] <= room:
            taken.append(number)
            room -= sizes[number]
    if not taken:
        taken.append(int(order[sizes[order].argmin()]))
    if len(taken) == len(order):
        taken.pop()
    held = np.isin(home, taken)[which]
    return np.flatnonzero(~held), np.flatnonzero(held)


def split_again(
    queries: Array, cluster_of: Array, *, split: Split, seed: int, test_fraction: float
) -> tuple[Array, Array]:
    """Split training rows as the whole was; by query where all of them are one cluster."""
    if split == "cluster" and cluster_of.max() > 0:
        return split_clusters(queries, cluster_of, seed=seed, test_fraction=test_fraction)
    return split_rows(queries, seed=seed, test_fraction=test_fraction)


def _check(test_fraction: float) -> None:
    if not 0 < test_fraction < 1:
        raise SpecInvalid(
            f"test_fraction {test_fraction}; allowed: above 0 and below 1", pointer="/test_fraction"
        )


def _numbers(queries: Array) -> tuple[Array, int]:
    """Number the distinct queries: [n] int64, and how many there are."""
    narrow = queries.astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    _, which = np.unique(narrow, axis=0, return_inverse=True)
    which = which.reshape(-1)
    distinct = int(which.max()) + 1
    if distinct < 2:
        raise DataInvalid("query_embeddings: all rows are equal; at least 2 distinct are needed")
    return which, distinct
