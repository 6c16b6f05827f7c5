"""Which clusters a query blends: attention over the training queries, kept sparse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.tensors.shards import Array

VERSION = 1
"""Of the routing, in every teacher's fingerprint: raise it when the same inputs route otherwise."""
BLOCK_ENTRIES = 16 * 2**20
"""Entries of the similarity matrix in memory at a time (64 MiB in float32)."""
BLOCK_ROWS = 1024
"""Training queries widened or narrowed to float32 at a time, to tell which are equal."""


@dataclass(frozen=True)
class EqualRows:
    """Which training queries are the same one, in float32 and with -0.0 as 0.0; found once.

    Holds a digest of 16 bytes per distinct query (about 150 bytes in Python), whatever its width.
    """

    first: Array
    """[n] int64: the first row equal to each, which is what numbers a distinct query."""
    row_of: dict[bytes, int]
    """First row by digest."""

    @classmethod
    def among(cls, keys: Array) -> EqualRows:
        """Number the rows of ``keys``: [n, d] floating."""
        row_of: dict[bytes, int] = {}
        numbers = (row_of.setdefault(found, row) for row, found in enumerate(_digests(keys)))
        return cls(np.fromiter(numbers, dtype=np.int64, count=len(keys)), row_of)

    def rows(self, queries: Array) -> Array:
        """Return the first row equal to each query, -1 where none is: [Q] int64."""
        numbers = (self.row_of.get(found, -1) for found in _digests(queries))
        return np.fromiter(numbers, dtype=np.int64, count=len(queries))


def _digests(rows: Array) -> Iterator[bytes]:
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS].astype(np.float32) + np.float32(0)  # -0 + 0 = 0
        for row in block:
            yield hashlib.blake2b(row, digest_size=16).digest()


def route(
    queries: Tensor,
    keys: Tensor,
    cluster_of: Tensor,
    *,
    cluster_count: int,
    temperature: float,
    top_k: int,
    exclude_rows: Tensor | None = None,
    equal_to: Tensor | None = None,
) -> Mixture:
    """Blend the clusters of the ``top_k`` nearest training queries.

    The weights are softmax(q K^T / temperature) over the kept neighbours (which is the full
    softmax, cut and renormalised), summed per cluster, in float64: a query whose neighbours share
    one cluster gives it a weight of exactly 1. Memory: see ``nearest``.

    Args:
        queries: [Q, d].
        keys: [n, d] training queries K, dtype and device of ``queries``.
        cluster_of: [n] int64 in [0, cluster_count).
        cluster_count: C.
        temperature: > 0, in units of the inner product.
        top_k: neighbours kept; all of them where there are fewer.
        exclude_rows: [Q] or [Q, e] int64, rows of ``keys`` each query may not see (leave one
            out); -1 excludes nothing.
        equal_to: [n] int64, the first row equal to each key (``EqualRows.first``): where a row is
            excluded, so are all its duplicates. Without it they are not.

    Returns:
        The mixture of Q queries; rows sum to 1.

    Raises:
        DataInvalid: a query may see no key at all.
    """
    neighbours, similarity = nearest(
        queries, keys, top_k=top_k, exclude_rows=exclude_rows, equal_to=equal_to
    )
    check_seen(similarity[:, 0], keys=len(keys))
    weights = (similarity.double() / temperature).softmax(dim=1)
    mixture = Mixture.from_topk(cluster_of[neighbours], weights, cluster_count)
    return replace(mixture, weights=mixture.weights.to(queries.dtype))


def check_seen(best: Tensor, *, keys: int) -> None:
    """Raise DataInvalid where a query sees none of ``keys``: its best, [Q], is -inf then."""
    if bool((best == -torch.inf).any()):
        raise DataInvalid(
            f"exclude_rows: a query excludes all {keys} training queries; more are needed"
        )


def nearest(
    queries: Tensor,
    keys: Tensor,
    *,
    top_k: int,
    exclude_rows: Tensor | None = None,
    equal_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ``top_k`` keys of largest inner product, blocked in memory.

    Scratch: two similarity matrices of BLOCK_ENTRIES at most (of 1 x n where n is larger).
    Arguments as for ``route``.

    Returns:
        Rows of ``keys`` [Q, k] int64, largest first, and the inner products [Q, k]; an excluded
        key that had to be taken (too few keys) has inner product -inf.
    """
    k = min(top_k, len(keys))
    rows = max(1, BLOCK_ENTRIES // max(1, len(keys)))
    repeated = None
    if exclude_rows is not None and equal_to is not None:
        repeated = equal_to.bincount(minlength=len(keys)) > 1
    found = []
    for start in range(0, max(1, len(queries)), rows):
        block = slice(start, start + rows)
        scores = queries[block] @ keys.T  # [B, n]
        if exclude_rows is not None:
            for column in exclude_rows[block].reshape(len(scores), -1).unbind(1):
                _exclude(scores, column, equal_to, repeated)
        found.append(scores.topk(k, dim=1))
    return torch.cat([top.indices for top in found]), torch.cat([top.values for top in found])


def _exclude(
    scores: Tensor, column: Tensor, equal_to: Tensor | None, repeated: Tensor | None
) -> None:
    """Write -inf into ``scores`` [B, n] at each row's ``column`` [B] and wherever equals stand."""
    at = (column >= 0).nonzero().flatten()
    scores[at, column[at]] = -torch.inf
    if equal_to is None or repeated is None:
        return
    numbers = equal_to[column[at]]
    some = repeated[numbers].nonzero().flatten()
    for part in some.split(max(1, len(scores) // 8)):  # the copy below: an eighth of the block
        rows = at[part]
        scores[rows] = scores[rows].masked_fill(equal_to == numbers[part, None], -torch.inf)


def own_rows(keys: Array, queries: Array) -> Array:
    """Find each query among the training queries; ``EqualRows`` where asked more than once.

    Args:
        keys: [n, d] training queries.
        queries: [Q, d], compared in float32.

    Returns:
        [Q, 1] int64: the first row of ``keys`` that is equal, -1 where there is none. What
        ``exclude_rows`` takes; ``equal_to`` extends it to the duplicates.
    """
    found: Array = EqualRows.among(keys).rows(queries)[:, None]
    return found
