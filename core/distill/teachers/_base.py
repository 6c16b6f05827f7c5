"""What a teacher is, and how its plugin hands it over.

A file in this package is a teacher; its name is the one in the spec. It ends in
``TEACHER = Teacher(spec=..., build=...)`` and needs its spec class in core/specs/teachers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from core.registry import scan
from core.rotations.mixture import Mixture
from core.specs.base import Closed
from core.tensors.formats import Federated
from core.tensors.shards import Array


@dataclass(frozen=True)
class Bivectors:
    """Logarithms of some clusters' rotations, with what a blend of them asks at every query."""

    values: Tensor
    """[C, d, d] skew."""
    norms: Tensor
    """[C] float64, upper bounds of ||L_c||_2, little above it."""


class BlendingTeacher(Protocol):
    """A federated model with a way to blend its clusters; built once, asked in blocks."""

    model: Federated
    anchor: Tensor
    """[d, d]: applied to a query once, before its blend of rotations."""
    bivectors: Tensor
    """[C, d, d] skew: the logarithms that are blended."""
    temperature: float
    top_k: int
    answers_new: bool
    """Whether it answers queries that are not stored."""

    def mixture(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Mixture:
        """Return each query's convex weights over the clusters."""

    def blend(self, queries: Tensor | Array, mixture: Mixture) -> Tensor:
        """Return the answers [Q, d] for given weights."""

    def own_rows(self, queries: Array) -> Array:
        """Return what a query excludes that may be a training query: [Q] int64, -1 for none."""

    def targets(self, queries: Tensor | Array, *, exclude_rows: Tensor | None = None) -> Tensor:
        """Return the teacher's answers: [Q, d], on its device.

        Args:
            queries: [Q, d] floating.
            exclude_rows: [Q] or [Q, e] int64, rows of the model's training queries that a query
                may not route through; -1 for none. A training query must exclude itself; its
                duplicates among the training queries go with it.
        """

    def fingerprint(self) -> str:
        """Return SHA-256 hex of everything but the query that a target depends on."""


@dataclass(frozen=True)
class Teacher:
    """A plugin: what may be said about it, and how it is made."""

    spec: type[Closed]
    build: Callable[[Federated, Any, str | torch.device, Bivectors | None], BlendingTeacher]
    """(model, spec, device, bivectors or None to compute them) -> the teacher."""


def teachers() -> Mapping[str, Teacher]:
    """Return every teacher by name."""
    return scan("core.distill.teachers", "TEACHER", Teacher)
