"""What a teacher is, and how its plugin hands it over.

A file in this package is a teacher; its name is the one in the spec. It ends in
``TEACHER = Teacher(spec=..., build=...)`` and needs its spec class in core/specs/teachers.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from core.distill.routing import EqualRows
from core.registry import scan
from core.rotations.mixture import Mixture
from core.specs.teachers import Answering
from core.tensors.formats import Federated, Pairs
from core.tensors.shards import Array


@dataclass(frozen=True)
class Bivectors:
    """Logarithms of some clusters' rotations, with what a blend of them asks at every query."""

    values: Tensor
    """[C, d, d] skew."""
    norms: Tensor
    """[C] float64, upper bounds of ||L_c||_2, little above it."""


@dataclass(frozen=True)
class Answers:
    """What a teacher says to some queries."""

    vectors: Tensor
    """[Q, m] targets, dtype and device of the teacher."""
    mixture: Mixture | None
    """The weights over the clusters that they were blended by; None of a teacher without any."""


class TeacherModel(Protocol):
    """A model with a way to answer queries; built once, asked in blocks.

    Training queries are [n, d], answers [n, m]; m is d where the model rotates.
    """

    device: torch.device
    answers_new: bool
    """Whether it answers queries that are not stored."""

    @property
    def queries(self) -> Array:
        """[n, d] float32, the training queries."""

    @property
    def truths(self) -> Array:
        """[n, m] float32, what belongs to them in truth."""

    @property
    def cluster_of(self) -> Array:
        """[n] int64: which of the training queries err together."""

    @property
    def centroids(self) -> Array | None:
        """[C, d] float32, of the clusters it weighs; None where it weighs none."""

    @property
    def anchor(self) -> Tensor | None:
        """[d, d]: applied to a query once, before all else; None where nothing is."""

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over the clusters.

        Raises:
            DataInvalid: it weighs none.
        """

    def answers(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Answers:
        """Return targets and weights; see ``targets``."""

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return the teacher's answers: [Q, m], on its device.

        Args:
            queries: [Q, d] floating.
            exclude_rows: [Q] or [Q, e] int64, rows of the model's training queries that a query
                may not route through; -1 for none. A training query must exclude itself; its
                duplicates among the training queries go with it.

        Raises:
            DataInvalid: a query is not stored, and the teacher answers stored ones alone.
        """

    def own_rows(self, queries: Array) -> Array:
        """Return what a query excludes that may be a training query: [Q] int64, -1 for none."""

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""

    def knowing(self, pairs: Pairs) -> Self:
        """Return the teacher with these pairs stored too; itself where it computes its answers."""


class RotationTeacher(TeacherModel, Protocol):
    """A teacher that blends the rotations of a federated model."""

    model: Federated
    routes_over: Literal["queries", "sources", "centroids"]
    """What a query is compared with to find its clusters."""
    temperature: float
    top_k: int

    @property
    def anchor(self) -> Tensor:
        """[d, d]: applied to a query once, before its blend of rotations."""

    @property
    def bivectors(self) -> Tensor:
        """[C, d, d] skew: log(G^T W_c), or log W_c where those are blended; computed if needed."""


class TrainedTeacher(ABC):
    """What teachers over a stored model share: its training rows, their identity, a device."""

    model: Any
    spec: Any

    def __init__(self, model: Any, spec: Any, device: str | torch.device) -> None:
        """Keep the model; ``spec.dtype`` is that of the answers, on ``device``."""
        self.model, self.spec = model, spec
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)

    @property
    def queries(self) -> Array:
        """[n, d] float32, the model's training queries."""
        rows: Array = self.model.queries
        return rows

    @property
    def truths(self) -> Array:
        """[n, m] float32, their targets."""
        rows: Array = self.model.targets
        return rows

    @property
    def cluster_of(self) -> Array:
        """[n] int64, their clusters."""
        numbers: Array = self.model.cluster_of
        return numbers

    def own_rows(self, queries: Array) -> Array:
        """Find queries among the training queries; see TeacherModel."""
        return self._equal.rows(queries)

    def knowing(self, pairs: Pairs) -> Self:
        """Need no further pairs: the model is whole."""
        del pairs
        return self

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""
        return self._fingerprint

    @abstractmethod
    def _hash(self) -> str:
        """Compute the fingerprint; asked for once."""

    @cached_property
    def _fingerprint(self) -> str:
        return self._hash()

    @cached_property
    def _equal(self) -> EqualRows:
        """Which training queries are the same one: hashes all of them, and only once."""
        return EqualRows.among(self.queries)

    def _tensor(self, values: Tensor | Array) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        return tensor.to(self.device, self.dtype)


@dataclass(frozen=True)
class Teacher:
    """A plugin: what may be said about it, and how it is made."""

    spec: type[Answering]
    build: Callable[[Any, Any, str | torch.device, Bivectors | None], TeacherModel]
    """(model of the format ``spec.reads``, spec, device, logarithms of a model of rotations or
    None to compute them) -> the teacher."""


def teachers() -> Mapping[str, Teacher]:
    """Return every teacher by name."""
    return scan("core.distill.teachers", "TEACHER", Teacher)
