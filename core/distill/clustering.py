"""Puts pairs into clusters; the same inputs and seed give the same clusters.

Clusters are numbered by their first row, none is empty, and each has at least
``min_cluster_size`` rows unless there is only one cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from sklearn.cluster import KMeans as LloydKMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from core.errors import DataInvalid, SpecInvalid
from core.specs.clusterings import Clustering, Groups, KMeans, Mst
from core.tensors.shards import Array

BLOCK_ROWS = 1024
"""Rows of the similarity matrix in memory at a time: [1024, n] float32."""
LLOYD_ROUNDS = 300
SLICE_FLOPS = 5e10
"""Of k-means between two reports: some seconds of one core."""
Report = Callable[[], None]
"""Called every few seconds of work; what it raises ends the work."""


def unheard() -> None:
    """Take a report that nobody waits for."""


def cluster(
    vectors: Array,
    spec: Clustering,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    report: Report = unheard,
) -> Array:
    """Give every row the number of its cluster.

    Args:
        vectors: [n, d] floating, usually the targets; only directions count.
        spec: how.
        seed: of k-means; the other methods draw nothing.
        groups: [n] labels, needed by method ``groups`` alone.
        report: called every few seconds.

    Returns:
        [n] int64 in [0, C).

    Raises:
        DataInvalid: method ``groups`` and the pairs have none, or not one per row.
        SpecInvalid: ``min_cluster_size`` is larger than the number of rows.
    """
    if spec.min_cluster_size > len(vectors):
        raise SpecInvalid(
            f"clustering.min_cluster_size {spec.min_cluster_size} is more than the "
            f"{len(vectors)} rows to cluster; allowed: 1 to {len(vectors)}",
            pointer="/clustering/min_cluster_size",
        )
    units = _units(vectors)
    if isinstance(spec, Mst):
        return _by_first_row(_mst(units, spec, report))
    if isinstance(spec, Groups):
        labels = _groups(groups, len(units))
    else:
        labels = _kmeans(units, spec, seed, report)
    return _by_first_row(merge_small(units, labels, spec.min_cluster_size))


def centroids(vectors: Array, cluster_of: Array, clusters: int) -> Array:
    """Average the rows of each cluster: [C, d] float32, summed in float64."""
    sums = np.zeros((clusters, vectors.shape[1]))
    np.add.at(sums, cluster_of, vectors.astype(np.float64))
    sizes = np.bincount(cluster_of, minlength=clusters).clip(min=1)
    means: Array = (sums / sizes[:, None]).astype(np.float32)
    return means


def merge_small(units: Array, labels: Array, min_cluster_size: int) -> Array:
    """Move the rows of too small clusters to the nearest centroid of those large enough.

    Where none is large enough everything becomes one cluster.

    Args:
        units: [n, d] rows of length 1.
        labels: [n] integers >= 0.
        min_cluster_size: rows a cluster needs to stay.
    """
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= min_cluster_size)
    if not len(large):
        return np.zeros(len(labels), dtype=np.int64)
    homeless = np.flatnonzero(~np.isin(labels, large))
    merged = labels.astype(np.int64)
    if len(homeless):
        means = centroids(units, labels, len(sizes))[large]
        merged[homeless] = large[(units[homeless] @ _units(means).T).argmax(axis=1)]
    return merged


def _units(vectors: Array) -> Array:
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    units: Array = (wide / np.maximum(length, np.finfo(np.float64).tiny)).astype(np.float32)
    return units


def _by_first_row(labels: Array) -> Array:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    ordered: Array = rank[inverse]
    return ordered


def _groups(groups: Sequence[str] | None, rows: int) -> Array:
    if groups is None:
        raise DataInvalid(
            "groups: the pairs have no groups column; clustering method 'groups' needs one label "
            "per row (allowed without: kmeans, mst)",
            pointer="/clustering/method",
        )
    if len(groups) != rows:
        raise DataInvalid(f"groups: {len(groups)} labels for {rows} rows")
    _, labels = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    return labels.astype(np.int64)


def _kmeans(units: Array, spec: KMeans, seed: int, report: Report) -> Array:
    n, d = units.shape
    distinct = len(np.unique(units, axis=0))
    count = min(spec.max_clusters, distinct, max(1, n // spec.min_cluster_size))
    rounds = max(2, int(SLICE_FLOPS / (2.0 * n * max(d, 32) * count)))
    return lloyd(units, count, seed=seed, rounds=rounds, report=report)


def lloyd(units: Array, count: int, *, seed: int, rounds: int, report: Report = unheard) -> Array:
    """Run k-means on one thread: with several, sums are added in any order.

    Args:
        units: [n, d] floating.
        count: of clusters, at most the number of distinct rows.
        seed: of the first centres.
        rounds: after so many, 2 at least, it reports and goes on from its own centres; they change
            no label. One alone would never tell that it has converged.
        report: what it raises ends the work.

    Returns:
        [n] int64 in [0, count).
    """
    left, centres = LLOYD_ROUNDS, "k-means++"
    while True:
        report()
        slice_ = min(rounds, left)
        with threadpool_limits(1):
            fitted = LloydKMeans(
                count,
                init=centres,
                n_init=1,
                max_iter=slice_,
                random_state=seed,
                algorithm="lloyd",
            ).fit(units)
        left -= slice_
        if fitted.n_iter_ < slice_ or left == 0:
            labels: Array = fitted.labels_.astype(np.int64)
            return labels
        centres = fitted.cluster_centers_


def _mst(units: Array, spec: Mst, report: Report) -> Array:
    """Cut the longest edges of the tree whose both sides stay large enough."""
    n = len(units)
    ends, lengths = spanning_tree(units, report=report)
    graph = csr_array((np.ones(n - 1), (ends[:, 0], ends[:, 1])), shape=(n, n))
    order, parent = breadth_first_order(graph, 0, directed=False)
    below = np.ones(n, dtype=np.int64)  # rows in the subtree of each row
    for row in order[:0:-1]:
        below[parent[row]] += below[row]
    cut = np.zeros(n, dtype=bool)  # the edge from a row to its parent
    cut[0] = True
    a, b = ends[np.lexsort((ends[:, 1], ends[:, 0], -lengths))].T
    for child in np.where(parent[a] == b, a, b):
        if cut.sum() == spec.max_clusters:
            break
        _cut_above(int(child), parent, below, cut, spec.min_cluster_size)
    kept = np.flatnonzero(~cut)
    forest = csr_array((np.ones(len(kept)), (kept, parent[kept])), shape=(n, n))
    labels: Array = connected_components(forest, directed=False)[1].astype(np.int64)
    return labels


def _cut_above(child: int, parent: Array, below: Array, cut: Array, least: int) -> None:
    """Cut the edge above ``child`` unless a side would have fewer than ``least`` rows."""
    if below[child] < least:
        return
    ancestors = [int(parent[child])]
    while not cut[ancestors[-1]]:
        ancestors.append(int(parent[ancestors[-1]]))
    if below[ancestors[-1]] - below[child] < least:
        return
    below[ancestors] -= below[child]
    cut[child] = True


def spanning_tree(units: Array, *, report: Report = unheard) -> tuple[Array, Array]:
    """Find the minimum spanning tree under cosine distance, exactly, in O(n) blocks of memory.

    Boruvka's rounds: every component looks for its nearest outside row, one block of the
    similarity matrix at a time. Rounding can make two blocks disagree on a tie, so scipy's
    sparse minimum spanning tree over all edges found removes what would close a cycle.

    Args:
        units: [n, d] rows of length 1.
        report: called for every block.

    Returns:
        Edges [n - 1, 2] int64 and their cosine distances [n - 1] float64.
    """
    n = len(units)
    component: Array = np.arange(n)
    edges = csr_array((n, n))
    while component.max(initial=0) > 0:
        nearest, similarity = _nearest_outside(units, component, report)
        best = np.lexsort((np.arange(n), -similarity, component))
        best = best[np.r_[True, np.diff(component[best]) > 0]]  # one row per component
        low, high = np.minimum(best, nearest[best]), np.maximum(best, nearest[best])
        # Distances are stored plus 1: csgraph takes a stored zero for no edge.
        weight = 2.0 - similarity[best].astype(np.float64)
        found = csr_array((weight, (low, high)), shape=(n, n))
        repeats = csr_array((np.ones(len(low)), (low, high)), shape=(n, n))
        found.data /= repeats.data
        edges = minimum_spanning_tree(edges + found)
        component = connected_components(edges, directed=False)[1]
    tree = edges.tocoo()
    return np.stack([tree.row, tree.col], axis=1).astype(np.int64), tree.data - 1.0


def _nearest_outside(units: Array, component: Array, report: Report) -> tuple[Array, Array]:
    """Return each row's most similar row of another component, and the similarity."""
    nearest = np.empty(len(units), dtype=np.int64)
    similarity = np.empty(len(units), dtype=np.float32)
    for start in range(0, len(units), BLOCK_ROWS):
        report()
        block = slice(start, start + BLOCK_ROWS)
        scores = units[block] @ units.T  # [block, n]
        scores[component[block, None] == component[None]] = -np.inf
        nearest[block] = scores.argmax(axis=1)
        similarity[block] = np.take_along_axis(scores, nearest[block, None], axis=1)[:, 0]
    return nearest, similarity
