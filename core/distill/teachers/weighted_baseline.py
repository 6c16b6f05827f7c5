"""Blends all clusters' maps by how near the query is to their centroids."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from core.distill.routing import check_seen
from core.distill.teachers._base import Teacher
from core.distill.teachers._linear import LinearTeacher
from core.rotations.mixture import Mixture
from core.specs.teachers import WeightedBaseline
from core.tensors.shards import Array


class WeightedBaselineTeacher(LinearTeacher):
    """``y = sum_c w_c q W_c``, ``w = softmax(q . centroid_c / tau)`` over all clusters.

    Needs no training query to answer, so it is what a federated model gives without its routing
    data. A training query is taken out of its cluster's centroid before it is compared, and with
    it its duplicates: else it would vote for its own cluster.
    """

    DEPENDS_ON = ("rotations", "scales", "queries", "cluster_of", "centroids")

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's weights over all clusters.

        Raises:
            DataInvalid: a query excludes all training queries.
        """
        given = self._tensor(queries)
        similarity = (given @ self._centroids.T).double()
        if exclude_rows is not None:
            similarity = self._without(given, similarity, exclude_rows.to(self.device))
        check_seen(similarity.max(dim=1).values, keys=len(self._keys))
        weights = (similarity / self.temperature).softmax(dim=1)
        return Mixture.from_dense(weights.to(given.dtype))

    @cached_property
    def _centroids(self) -> Tensor:
        return self._tensor(self.model.centroids)

    @cached_property
    def _sizes(self) -> Tensor:
        return self._cluster_of.bincount(minlength=len(self._rotations)).double()

    @cached_property
    def _sums(self) -> Tensor:
        """[C, d] float64: sum of each cluster's training queries."""
        zero = torch.zeros(self._centroids.shape, dtype=torch.float64, device=self.device)
        return zero.index_add(0, self._cluster_of, self._keys.double())

    @cached_property
    def _stretch(self) -> Tensor:
        """[C] float64: length of the stored centroid over that of the queries' mean."""
        means = (self._sums / self._sizes[:, None]).norm(dim=1)
        stored = self._centroids.double().norm(dim=1)
        return torch.where(means > 0, stored / means.clamp(min=1e-300), torch.ones_like(means))

    @cached_property
    def _among(self) -> tuple[Tensor, Tensor]:
        """Training rows by what they are equal to, and where each group ends: [n], [n + 1]."""
        order = self._equal_to.argsort(stable=True)
        counts = self._equal_to.bincount(minlength=len(self._equal_to))
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _without(self, queries: Tensor, similarity: Tensor, exclude_rows: Tensor) -> Tensor:
        """Compare [Q, d] queries with centroids that lack what each of them excludes: [Q, C].

        q . mean without some = (sum of q . all - sum of q . each) / (n - how many), of the model's
        own queries; a stored centroid of another length than their mean (an imported one may be
        normalised) keeps that length. A cluster that loses all its rows is out of reach.
        """
        asked, rows = self._excluded(exclude_rows.reshape(len(queries), -1))
        at = asked * similarity.shape[1] + self._cluster_of[rows]
        products = (queries[asked].double() * self._keys[rows].double()).sum(dim=1)
        lost = torch.zeros_like(similarity).flatten()
        gone = torch.zeros_like(lost)
        lost = lost.index_add(0, at, products).view_as(similarity)
        gone = gone.index_add(0, at, torch.ones_like(products)).view_as(similarity)
        left = self._sizes - gone
        whole = queries.double() @ self._sums.T
        changed = self._stretch * (whole - lost) / left.clamp(min=1)
        changed = torch.where(gone > 0, changed, similarity)
        return changed.masked_fill(left <= 0, -torch.inf)

    def _excluded(self, exclude_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of (query, training row it may not see), duplicates with them, each once."""
        asked, column = (exclude_rows >= 0).nonzero(as_tuple=True)
        numbers = self._equal_to[exclude_rows[asked, column]]
        pairs = torch.stack([asked, numbers], dim=1).unique(dim=0)
        order, ends = self._among
        starts, lengths = ends[pairs[:, 1]], ends.diff()[pairs[:, 1]]
        within = torch.arange(int(lengths.sum()), device=self.device)
        within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return (
            pairs[:, 0].repeat_interleave(lengths),
            order[starts.repeat_interleave(lengths) + within],
        )


TEACHER = Teacher(spec=WeightedBaseline, build=WeightedBaselineTeacher)
