"""Answers a stored query by its own stored target: nothing is computed."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from core.distill.teachers._base import Teacher
from core.distill.teachers._federated import FederatedTeacher
from core.distill.teachers._keys import digest
from core.distill.teachers._stored import StoredAnswers
from core.errors import DataInvalid
from core.rotations.mixture import Mixture
from core.specs.teachers import Paired
from core.tensors.formats import Federated, Pairs
from core.tensors.shards import Array


class PairedTeacher(FederatedTeacher):
    """The pairs themselves as a teacher: what a student learns from where no model is trusted.

    A query stored several times has the mean of its targets. ``exclude_rows`` changes the weights
    alone: a stored pair is no neighbour's vote, so nothing leaks by looking it up. The weights are
    those of the model's routing, for students that learn a router.
    """

    DEPENDS_ON = ("queries", "targets", "cluster_of")

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Look up [Q, d] queries: their targets [Q, d]; see TeacherModel."""
        del exclude_rows
        return self._look_up(queries)

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Look up [Q, d] queries, whatever the weights."""
        del mixture
        return self._look_up(queries)

    def knowing(self, pairs: Pairs) -> Self:
        """Return the teacher with these pairs stored too."""
        if pairs.queries.shape[1] != self.model.queries.shape[1]:
            raise DataInvalid(
                f"pairs have {pairs.queries.shape[1]} dimensions, the model "
                f"{self.model.queries.shape[1]}"
            )
        other = type(self)(self.model, self.spec, self.device, self._given)
        other._stored = _joined(self._stored, pairs)
        return other

    def _hash(self) -> str:
        facts = {"what": "paired", "of": super()._hash()}
        return digest(facts, self._stored.queries, self._stored.targets)

    @cached_property
    def _stored(self) -> Federated:
        return self.model

    @cached_property
    def _answers(self) -> StoredAnswers:
        return StoredAnswers(self._stored.queries, self._stored.targets, teacher="paired")

    def _look_up(self, queries: Tensor | Array) -> Tensor:
        return self._tensor(self._answers.look_up(queries))


def _joined(stored: Federated, pairs: Pairs) -> Federated:
    """Return the model with more pairs among its queries and targets; only those two count."""
    return replace(
        stored,
        queries=np.concatenate([stored.queries, pairs.queries.astype(np.float32)]),
        targets=np.concatenate([stored.targets, pairs.targets.astype(np.float32)]),
    )


TEACHER = Teacher(spec=Paired, build=PairedTeacher)
