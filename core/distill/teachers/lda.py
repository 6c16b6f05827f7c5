"""Multi-head LDA: heads blended by a softmax over their centroids (documents 001 and 003)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from core.distill.lda import MultiHeadLDA
from core.distill.routing import EqualRows
from core.distill.teachers._base import Answers, Bivectors, Teacher
from core.distill.teachers._keys import digest
from core.rotations.mixture import Mixture
from core.specs.teachers import Lda
from core.tensors.formats import Pairs
from core.tensors.lda import LDA
from core.tensors.shards import Array

VERSION = 1
"""Of the algorithm, in the fingerprint: raise it when the same inputs give other bytes."""


class LdaTeacher:
    """Answers any query from N heads, whatever it was fitted on.

    ``exclude_rows`` changes nothing: a head is a mean of many questions, so none is its own
    neighbour, and what a student learns is the one function that is served.
    """

    answers_new = True
    anchor = None

    def __init__(
        self,
        model: LDA,
        spec: Lda,
        device: str | torch.device = "cpu",
        bivectors: Bivectors | None = None,
    ) -> None:
        """Take the model to a device; it has no rotations, so ``bivectors`` are None."""
        assert bivectors is None
        self.model, self.spec = model, spec
        self.device = torch.device(device)
        self.dtype = getattr(torch, spec.dtype)
        self.temperature = spec.temperature or model.temperature
        answers, maps = (
            None if values is None else torch.from_numpy(values)
            for values in (model.answers, model.maps)
        )
        heads = MultiHeadLDA(
            torch.from_numpy(model.centroids), answers, maps=maps, temperature=self.temperature
        )
        self.heads = heads.to(self.device, self.dtype)

    @property
    def queries(self) -> Array:
        """[n, d] float32, the training queries."""
        return self.model.queries

    @property
    def truths(self) -> Array:
        """[n, m] float32, their targets."""
        return self.model.targets

    @property
    def cluster_of(self) -> Array:
        """[n] int64, their heads."""
        return self.model.cluster_of

    @property
    def centroids(self) -> Array:
        """[N, d] float32, of the heads."""
        return self.model.centroids

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's weights over all heads."""
        del exclude_rows
        return Mixture.from_dense(self.heads.weights(self._tensor(queries)))

    def answers(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Answers:
        """Return answers [Q, m], dtype ``spec.dtype``, and weights; see TeacherModel."""
        given = self._tensor(queries)
        return Answers(self.targets(given), self.mixture(given, exclude_rows=exclude_rows))

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return answers [Q, m], dtype ``spec.dtype``; see TeacherModel."""
        del exclude_rows
        with torch.no_grad():
            vectors: Tensor = self.heads(self._tensor(queries))
        return vectors

    def own_rows(self, queries: Array) -> Array:
        """Find queries among the training queries; see TeacherModel."""
        return self._equal.rows(queries)

    def knowing(self, pairs: Pairs) -> Self:
        """Need no pairs: the answers are computed."""
        del pairs
        return self

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        told: dict[str, Any] = self.spec.model_dump(mode="json")
        facts = {**told, "what": "lda", "version": VERSION, "temperature": self.temperature}
        values = self.model.maps if self.model.answers is None else self.model.answers
        assert values is not None
        return digest({**facts, "mode": self.model.mode}, self.model.centroids, values)

    @cached_property
    def _equal(self) -> EqualRows:
        return EqualRows.among(self.model.queries)

    def _tensor(self, values: Tensor | Array) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.to(self.device, self.dtype)


TEACHER = Teacher(spec=Lda, build=LdaTeacher)
