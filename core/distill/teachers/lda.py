"""Multi-head LDA: heads blended by a softmax over their centroids (documents 001 and 003)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.distill.lda import MultiHeadLDA
from core.distill.teachers._base import Answers, Bivectors, Teacher, TrainedTeacher
from core.distill.teachers._keys import digest
from core.rotations.mixture import Mixture
from core.specs.teachers import Lda
from core.tensors.lda import LDA
from core.tensors.shards import Array

VERSION = 1
"""Of the algorithm, in the fingerprint: raise it when the same inputs give other bytes."""


class LdaTeacher(TrainedTeacher):
    """Answers any query from N heads, whatever it was fitted on.

    ``exclude_rows`` changes nothing: a head is a mean of many questions, so none is its own
    neighbour, and what a student learns is the one function that is served.
    """

    model: LDA
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
        super().__init__(model, spec, device)
        self.temperature = spec.temperature or model.temperature
        answers, maps = (
            None if values is None else self._tensor(values)
            for values in (model.answers, model.maps)
        )
        # Of this dtype from the start: directions are divided out in it.
        self.heads = MultiHeadLDA(
            self._tensor(model.centroids), answers, maps=maps, temperature=self.temperature
        )

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

    def _hash(self) -> str:
        told: dict[str, Any] = self.spec.model_dump(mode="json")
        facts = {**told, "what": "lda", "version": VERSION, "temperature": self.temperature}
        values = self.model.maps if self.model.answers is None else self.model.answers
        assert values is not None
        return digest({**facts, "mode": self.model.mode}, self.model.centroids, values)


TEACHER = Teacher(spec=Lda, build=LdaTeacher)
