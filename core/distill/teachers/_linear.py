"""Blends of the clusters' maps themselves: one product per cluster, no logarithm."""

from __future__ import annotations

import torch
from torch import Tensor

from core.distill.teachers._federated import FederatedTeacher
from core.rotations.mixture import Mixture
from core.tensors.shards import Array


class LinearTeacher(FederatedTeacher):
    """Blends the clusters' maps; an answer has its query's length, but with compat ``legacy``."""

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Map [Q, d] queries by given weights: [Q, d], dtype ``spec.dtype``."""
        return linear_blend(
            self._tensor(queries),
            self._rotations,
            mixture,
            log_scales=self._log_scales,
            keep_length=self.spec.compat != "legacy",
        )


def linear_blend(
    queries: Tensor,
    rotations: Tensor,
    mixture: Mixture,
    *,
    log_scales: Tensor | None,
    keep_length: bool,
) -> Tensor:
    """Compute sum_c w_qc s_c q W_c, one product per cluster over the queries that weigh it.

    Args:
        queries: [Q, d].
        rotations: [C, d, d], any float dtype.
        mixture: Q queries over C clusters.
        log_scales: [C] float64, log s_c; none where nothing scales.
        keep_length: put the sum to the query's length times exp(sum_c w_c log s_c), as rotating
            by a blend would: rotations that disagree make it shorter. A sum of length 0 stays.

    Returns:
        [Q, d], dtype of ``queries``; summed in the order of the clusters.
    """
    total = torch.zeros_like(queries)
    by_cluster = mixture.clusters.argsort(stable=True)
    rows, weights = mixture.queries[by_cluster], mixture.weights.to(queries.dtype)[by_cluster]
    if log_scales is not None:
        weights = weights * log_scales[mixture.clusters[by_cluster]].exp().to(queries.dtype)
    counts = mixture.clusters.bincount(minlength=mixture.cluster_count).tolist()
    parts = zip(rows.split(counts), weights.split(counts), rotations, strict=True)
    for group, share, rotation in parts:
        if len(group):
            product = queries[group] @ rotation.to(queries.dtype)
            total[group] += share[:, None] * product
    if not keep_length:
        return total
    lengths = queries.norm(dim=1)
    if log_scales is not None:
        lengths = lengths * mixture.sums(log_scales).exp().to(queries.dtype)
    smallest = torch.finfo(queries.dtype).tiny
    kept: Tensor = total * (lengths / total.norm(dim=1).clamp(min=smallest))[:, None]
    return kept
