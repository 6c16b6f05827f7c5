"""Products of many small groups of rows, each with its cluster's matrix, in few launches.

A GPU takes longer to launch a product than to compute a small one. Clusters of about the same
number of rows are padded to the longest of them and multiplied at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from core.rotations.mixture import Mixture

GATHER_BYTES = 128 * 2**20
"""Bivectors copied together for one batched product, or a single one where that is larger."""
FULL = 7 / 8
"""Least share of a group's padded rows that are in use."""


@dataclass(frozen=True)
class Group:
    """Clusters multiplied at once."""

    clusters: Tensor
    """[B] int64."""
    rows: int
    """P: of each cluster, padding included."""
    start: int
    """Of the group's first row among all padded rows."""

    @property
    def span(self) -> slice:
        """Its rows among all padded rows."""
        return slice(self.start, self.start + len(self.clusters) * self.rows)


def cut_groups(counts: list[int], *, most: int) -> list[tuple[list[int], int]]:
    """Put clusters of like size together: (cluster numbers, rows of the largest) per group.

    Args:
        counts: [C] rows of each cluster; one without rows is in no group.
        most: clusters in a group, >= 1.
    """
    descending = sorted((c for c, count in enumerate(counts) if count), key=lambda c: -counts[c])
    groups: list[tuple[list[int], int]] = []
    for cluster in descending:
        if groups:
            members, rows = groups[-1]
            if len(members) < most and counts[cluster] >= FULL * rows:
                members.append(cluster)
                continue
        groups.append(([cluster], counts[cluster]))
    return groups


@dataclass(frozen=True)
class GroupedStep:
    """phi -> (2 B / r) phi for the first ``active`` queries, clusters grouped by their size.

    Deterministic: every sum has a fixed order. In float32 its products are as exact as torch's
    float32 matmul precision, which is IEEE (no TF32) unless someone lowered it.
    """

    active: int
    rows: Tensor
    """[N] int64: the query of each padded row; where none is, the first."""
    positions: Tensor
    """[E] int64: where the product of each entry of the mixture stands among the padded rows."""
    offsets: Tensor
    """[active + 1] int64, into ``positions``."""
    weights: Tensor
    """[E]: 2 w / r."""
    groups: list[Group]
    gathered: Tensor
    """[N, d] scratch."""
    products: Tensor
    """[N, d] scratch."""
    matrices: Tensor
    """[largest B, d, d] scratch."""

    @classmethod
    def of(cls, mixture: Mixture, inverse_radii: Tensor, like: Tensor) -> GroupedStep:
        """Place the pairs of some queries, of dtype and width of ``like``.

        Args:
            mixture: of the active queries.
            inverse_radii: [active] float64, 1 / r.
            like: [_, d].
        """
        d, device = like.shape[1], mixture.clusters.device
        counts = mixture.clusters.bincount(minlength=mixture.cluster_count)
        groups, first, total = _placed(counts, d * d * like.element_size())
        clusters, by_cluster = mixture.clusters.sort(stable=True)
        rank = torch.arange(len(clusters), device=device) - (counts.cumsum(0) - counts)[clusters]
        places = first[clusters] + rank
        positions = torch.empty_like(places)
        positions[by_cluster] = places
        rows = places.new_zeros(total)
        rows[places] = mixture.queries[by_cluster]
        doubled = 2 * inverse_radii.repeat_interleave(mixture.lengths, output_size=len(clusters))
        largest = max((len(group.clusters) for group in groups), default=0)
        return cls(
            active=mixture.query_count,
            rows=rows,
            positions=positions,
            offsets=mixture.offsets,
            weights=(mixture.weights.double() * doubled).to(like.dtype),
            groups=groups,
            gathered=like.new_empty(total, d),
            products=like.new_empty(total, d),
            matrices=like.new_empty(largest, d, d),
        )

    def apply(self, phi: Tensor, bivectors: Tensor) -> Tensor:
        """Return [active, d] from phi: [>= active, d]."""
        torch.index_select(phi, 0, self.rows, out=self.gathered)
        for group in self.groups:
            B, P, d = len(group.clusters), group.rows, phi.shape[1]
            matrices = self.matrices[:B]
            torch.index_select(bivectors, 0, group.clusters, out=matrices)
            torch.bmm(
                self.gathered[group.span].view(B, P, d),
                matrices,
                out=self.products[group.span].view(B, P, d),
            )
        return embedding_bag(
            self.positions,
            self.products,
            self.offsets,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )


def _placed(counts: Tensor, matrix_bytes: int) -> tuple[list[Group], Tensor, int]:
    """Lay the groups out one after another.

    Returns:
        the groups; [C] int64, the first padded row of each cluster; how many padded rows.
    """
    first, groups, total = [0] * len(counts), [], 0
    most = max(1, GATHER_BYTES // matrix_bytes)
    for members, rows in cut_groups(counts.tolist(), most=most):
        groups.append(Group(torch.tensor(members, device=counts.device), rows, total))
        for cluster in members:
            first[cluster] = total
            total += rows
    return groups, torch.tensor(first, dtype=torch.int64, device=counts.device), total
