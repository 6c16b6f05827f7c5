"""Which clusters a query blends, and how much of each: a sparse matrix by rows (CSR)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Weights of Q queries over C clusters. Every (query, cluster) pair stands here at most once.

    Weights are meant to be convex (non-negative, rows sum to 1); nothing here needs it.
    """

    offsets: Tensor
    """[Q + 1] int64: the entries of query q are ``offsets[q]:offsets[q + 1]``."""
    clusters: Tensor
    """[E] int64, each in [0, cluster_count), ascending within a query."""
    weights: Tensor
    """[E] floating."""
    cluster_count: int

    @property
    def query_count(self) -> int:
        """Q, the number of rows."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """[Q] int64: entries per query."""
        return self.offsets.diff()

    @property
    def queries(self) -> Tensor:
        """[E] int64: the query of each entry, ascending."""
        index = torch.arange(self.query_count, device=self.offsets.device)
        return index.repeat_interleave(self.lengths, output_size=self.clusters.numel())

    @classmethod
    def from_dense(cls, weights: Tensor) -> Mixture:
        """Keep the non-zero entries of ``weights``: [Q, C] floating."""
        queries, clusters = weights.nonzero(as_tuple=True)
        offsets = _offsets((weights != 0).sum(1))
        return cls(offsets, clusters, weights[queries, clusters], weights.shape[1])

    @classmethod
    def from_topk(
        cls, cluster_of_neighbour: Tensor, weights: Tensor, cluster_count: int
    ) -> Mixture:
        """Merge the weights of neighbours that share a cluster.

        Args:
            cluster_of_neighbour: [Q, k] integer, each in [0, cluster_count).
            weights: [Q, k] floating.
            cluster_count: C.
        """
        Q, k = weights.shape
        if cluster_of_neighbour.shape != weights.shape:
            raise ValueError(
                f"neighbours {tuple(cluster_of_neighbour.shape)} and weights {(Q, k)} must agree"
            )
        clusters, order = cluster_of_neighbour.long().sort(dim=1, stable=True)  # [Q, k]
        if clusters.numel() and not 0 <= int(clusters.min()) <= int(clusters.max()) < cluster_count:
            raise ValueError(f"cluster numbers must lie in [0, {cluster_count})")
        first = torch.ones_like(clusters, dtype=torch.bool)
        first[:, 1:] = clusters[:, 1:] != clusters[:, :-1]
        starts = first.flatten().nonzero().flatten()
        runs = torch.cat([starts, starts.new_tensor([Q * k])]).diff()
        merged = segment_sums(weights.gather(1, order).flatten(), runs)
        return cls(_offsets(first.sum(1)), clusters[first], merged, cluster_count)

    def dense(self) -> Tensor:
        """Return [Q, C], the dtype of the weights."""
        full = self.weights.new_zeros(self.query_count, self.cluster_count)
        full[self.queries, self.clusters] = self.weights
        return full

    def rows(self, index: Tensor | slice) -> Mixture:
        """Return the mixture of the queries at ``index``: a slice, or [R] integers in any order."""
        lengths = self.lengths[index]
        offsets = _offsets(lengths)
        total = int(offsets[-1])
        shift = (self.offsets[:-1][index] - offsets[:-1]).repeat_interleave(
            lengths, output_size=total
        )
        entries = torch.arange(total, device=offsets.device) + shift
        return Mixture(offsets, self.clusters[entries], self.weights[entries], self.cluster_count)

    def kept(self, mask: Tensor) -> Mixture:
        """Return the mixture with only the entries where ``mask`` ([E] bool) holds."""
        lengths = segment_sums(mask.double(), self.lengths).long()
        return Mixture(
            _offsets(lengths), self.clusters[mask], self.weights[mask], self.cluster_count
        )

    def sums(self, values: Tensor) -> Tensor:
        """Return sum_c w_qc values_c: [Q] float64, from values: [C]."""
        return segment_sums(self.weights.double() * values.double()[self.clusters], self.lengths)

    def radii(self, norms: Tensor) -> Tensor:
        """Return sum_c |w_qc| ||L_c||: [Q] float64, an upper bound of ||B_q||_2."""
        reach = self.weights.double().abs() * norms.double()[self.clusters]
        return segment_sums(reach, self.lengths)


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum consecutive runs of ``values`` ([E]); runs of length 0 give 0. Deterministic.

    Returns:
        [len(lengths)], the dtype of ``values``.
    """
    if not lengths.numel():
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)


def _offsets(lengths: Tensor) -> Tensor:
    """[Q] -> [Q + 1] int64, starting at 0."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
