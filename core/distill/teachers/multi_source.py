"""Rotates by a blend over several federated models at once, each with its own clusters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.distill.routing import check_seen, nearest
from core.distill.teachers._base import Teacher
from core.distill.teachers.rotational import RotationalTeacher
from core.rotations.mixture import Mixture
from core.specs.teachers import MultiSource
from core.tensors.shards import Array


@dataclass(frozen=True)
class Source:
    """One of the models that were combined: its share of the clusters and training queries."""

    rows: slice
    clusters: slice
    temperature: float
    top_k: int


class MultiSourceTeacher(RotationalTeacher):
    """``y = q G exp(sum_s a_s sum_c w_sc log(G^T W_sc))``: clusters are kept, never averaged.

    Inside a source the weights are its own routing, at its own temperature and top_k (a ``top_k``
    or ``temperature`` in the spec holds for all of them). ``a_s`` is a softmax over the sources of
    the largest inner product, at their mean temperature, or 1 / S. Over a model with one source it
    is ``rotational``.
    """

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over all sources' clusters.

        Raises:
            DataInvalid: a query excludes all training queries of all sources.
        """
        given = self._tensor(queries)
        numbers = None
        if exclude_rows is not None:
            at = exclude_rows.to(self.device)
            numbers = torch.where(at >= 0, self._equal_to[at.clamp(min=0)], -1)
        parts = [self._within(source, given, numbers) for source in self._sources]
        best = torch.stack([near for _, near in parts], dim=1)  # [Q, S]
        check_seen(best.max(dim=1).values, keys=len(self._keys))
        shares = self._shares(best)
        dense = torch.zeros(
            len(given), len(self._rotations), dtype=torch.float64, device=self.device
        )
        for number, (weights, _) in enumerate(parts):
            dense[:, self._sources[number].clusters] = shares[:, number, None] * weights
        return Mixture.from_dense(dense.to(given.dtype))

    @cached_property
    def _sources(self) -> list[Source]:
        clusters, rows = len(self._rotations), len(self._keys)
        alone = {"clusters": clusters, "rows": rows, "temperature": self.temperature,
                 "top_k": self.top_k}  # fmt: skip
        found, row, cluster = [], 0, 0
        for told in self.model.manifest.get("sources", [alone]):
            ends = row + told["rows"], cluster + told["clusters"]
            found.append(
                Source(
                    rows=slice(row, ends[0]),
                    clusters=slice(cluster, ends[1]),
                    temperature=float(self.spec.temperature or told["temperature"]),
                    top_k=self.spec.top_k or told["top_k"],
                )
            )
            row, cluster = ends
        return found

    def _within(
        self, source: Source, queries: Tensor, numbers: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Route inside one source: weights [Q, C_s] float64 and the largest product [Q]."""
        own = self._equal_to[source.rows]
        excluded, equal_to = None, None
        if numbers is not None:
            first = torch.full((len(self._keys),), -1, device=self.device)
            positions = torch.arange(len(own), device=self.device)
            first = first.scatter_reduce(0, own, positions, "amin", include_self=False)
            excluded = torch.where(numbers >= 0, first[numbers.clamp(min=0)], -1)
            equal_to = first[own]
        rows, similarity = nearest(
            queries,
            self._keys[source.rows],
            top_k=source.top_k,
            exclude_rows=excluded,
            equal_to=equal_to,
        )
        near = similarity[:, 0].double()
        weights = (similarity.double() / source.temperature).softmax(dim=1).nan_to_num(0.0)
        clusters = self._cluster_of[source.rows][rows] - source.clusters.start
        dense = weights.new_zeros(len(queries), source.clusters.stop - source.clusters.start)
        return dense.scatter_add_(1, clusters, weights), near

    def _shares(self, best: Tensor) -> Tensor:
        """Weigh the sources of each query: [Q, S] float64, rows sum to 1."""
        if self.spec.source_weights == "equal":
            there = (best > -torch.inf).double()
            return there / there.sum(dim=1, keepdim=True)
        temperatures = [source.temperature for source in self._sources]
        return (best / (sum(temperatures) / len(temperatures))).softmax(dim=1)


TEACHER = Teacher(spec=MultiSource, build=MultiSourceTeacher)
