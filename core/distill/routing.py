"""Which clusters a query blends: attention over the training queries, kept sparse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.tensors.shards import Array

BLOCK_ENTRIES = 16 * 2**20
"""Entries of the similarity matrix in memory at a time (64 MiB in float32)."""


def route(
    queries: Tensor,
    keys: Tensor,
    cluster_of: Tensor,
    *,
    cluster_count: int,
    temperature: float,
    top_k: int,
    exclude_rows: Tensor | None = None,
) -> Mixture:
    """Blend the clusters of the ``top_k`` nearest training queries.

    The weights are softmax(q K^T / temperature) over the kept neighbours (which is the full
    softmax, cut and renormalised), summed per cluster.

    Args:
        queries: [Q, d].
        keys: [n, d] training queries K, dtype and device of ``queries``.
        cluster_of: [n] int64 in [0, cluster_count).
        cluster_count: C.
        temperature: > 0, in units of the inner product.
        top_k: neighbours kept; all of them where there are fewer.
        exclude_rows: [Q] or [Q, e] int64, rows of ``keys`` each query may not see (leave one
            out); -1 excludes nothing.

    Returns:
        The mixture of Q queries; rows sum to 1.

    Raises:
        DataInvalid: a query may see no key at all.
    """
    neighbours, similarity = nearest(queries, keys, top_k=top_k, exclude_rows=exclude_rows)
    if bool((similarity[:, 0] == -torch.inf).any()):
        raise DataInvalid(
            f"exclude_rows: a query excludes all {len(keys)} training queries; more are needed"
        )
    weights = (similarity / temperature).softmax(dim=1)
    return Mixture.from_topk(cluster_of[neighbours], weights, cluster_count)


def nearest(
    queries: Tensor, keys: Tensor, *, top_k: int, exclude_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the ``top_k`` keys of largest inner product, blocked in memory.

    Returns:
        Rows of ``keys`` [Q, k] int64, largest first, and the inner products [Q, k]; an excluded
        key that had to be taken (too few keys) has inner product -inf.
    """
    k = min(top_k, len(keys))
    rows = max(1, BLOCK_ENTRIES // max(1, len(keys)))
    found = [
        _nearest_block(
            queries[start : start + rows],
            keys,
            k,
            None if exclude_rows is None else exclude_rows[start : start + rows],
        )
        for start in range(0, max(1, len(queries)), rows)
    ]
    return torch.cat([index for index, _ in found]), torch.cat([value for _, value in found])


def _nearest_block(
    queries: Tensor, keys: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = queries @ keys.T  # [B, n]
    if exclude is not None:
        forbidden = exclude.reshape(len(queries), -1)
        for column in forbidden.unbind(1):
            at = (column >= 0).nonzero().flatten()
            scores[at, column[at]] = -torch.inf
    values, index = scores.topk(k, dim=1)
    return index, values


def own_rows(keys: Array, queries: Array) -> Array:
    """Find each query among the training queries, bit for bit.

    Args:
        keys: [n, d] training queries.
        queries: [Q, d], same dtype.

    Returns:
        [Q, e] int64 rows of ``keys``, -1 where there is none: what ``exclude_rows`` takes, so
        that a training query routes neither through itself nor through its duplicates.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key.tobytes(), []).append(row)
    own = [rows_of.get(query.tobytes(), []) for query in queries]
    found = np.full((len(queries), max(1, *map(len, own), 1)), -1, dtype=np.int64)
    for query, rows in enumerate(own):
        found[query, : len(rows)] = rows
    return found
