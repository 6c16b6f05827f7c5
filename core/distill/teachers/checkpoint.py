"""A teacher's stored embeddings: every input has its own answer, nothing is computed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.distill.teachers._base import Answers, Bivectors, Teacher, TrainedTeacher
from core.distill.teachers._keys import digest
from core.distill.teachers._stored import StoredAnswers
from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.specs.teachers import Checkpoint
from core.tensors.embeddings import Embeddings
from core.tensors.shards import Array


class CheckpointTeacher(TrainedTeacher):
    """Looks answers up: those of its training rows, and of the rows that were held out.

    An input stored several times has the mean of its embeddings. ``exclude_rows`` changes
    nothing: a stored row is no neighbour's vote.
    """

    model: Embeddings
    answers_new = False
    anchor = None
    centroids = None

    def __init__(
        self,
        model: Embeddings,
        spec: Checkpoint,
        device: str | torch.device = "cpu",
        bivectors: Bivectors | None = None,
    ) -> None:
        """Keep the model; it has no rotations, so ``bivectors`` are None."""
        assert bivectors is None
        super().__init__(model, spec, device)

    @cached_property
    def queries(self) -> Array:
        """[t, d] float32, the inputs of the training rows."""
        return self.model.given[self.model.train_rows].astype(np.float32)

    @cached_property
    def truths(self) -> Array:
        """[t, D] float32, their embeddings."""
        return self.model.embeddings[self.model.train_rows].astype(np.float32)

    @cached_property
    def cluster_of(self) -> Array:
        """[t] int64: their groups by number, one for all where there are none."""
        if self.model.groups is None:
            return np.zeros(len(self.model.train_rows), dtype=np.int64)
        _, numbers = np.unique(np.array(self.model.groups), return_inverse=True)
        own: Array = numbers.reshape(-1)[self.model.train_rows].astype(np.int64)
        return own

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Weigh nothing; see TeacherModel."""
        del queries, exclude_rows
        raise DataInvalid("teacher 'checkpoint' weighs no clusters")

    def answers(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Answers:
        """Look up [Q, d] inputs; see TeacherModel."""
        return Answers(self.targets(queries, exclude_rows=exclude_rows), None)

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Look up [Q, d] inputs: [Q, D]; see TeacherModel."""
        del exclude_rows
        return self._tensor(self._answers.look_up(queries))

    def _hash(self) -> str:
        facts: dict[str, Any] = {**self.spec.model_dump(mode="json"), "version": 1}
        return digest(facts, self.model.given, self.model.embeddings)

    @cached_property
    def _answers(self) -> StoredAnswers:
        return StoredAnswers(self.model.given, self.model.embeddings, teacher="checkpoint")


TEACHER = Teacher(spec=Checkpoint, build=CheckpointTeacher)
