"""What a loss term sees, and how its plugin hands it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from core.registry import scan
from core.rotations.sphere import squared_angles


@dataclass(frozen=True)
class Batch:
    """One batch, as every term sees it."""

    student: Tensor
    """[B, d] the student's vectors, of any length: a term looks at their directions alone."""
    teacher: Tensor
    """[B, d] the teacher's, constant."""
    candidates: Tensor | None = None
    """[M, d] targets to retrieve among, constant; None where no term asked for them."""
    log_weights: Tensor | None = None
    """[B, C] log of the student's router, or none."""
    weights: Tensor | None = None
    """[B, C] the teacher's weights over the clusters."""

    @cached_property
    def angles(self) -> Tensor:
        """[B] squared angles between student and teacher, which several terms look at."""
        return squared_angles(self.student, self.teacher)


@dataclass(frozen=True)
class Loss:
    """A plugin: a term, and what it needs beside the vectors."""

    compute: Callable[[Batch], Tensor]
    """-> a scalar."""
    needs_router: bool = False
    """A learnt one; without it the term is left out."""
    needs_candidates: bool = False


def losses() -> Mapping[str, Loss]:
    """Return every term by name."""
    return scan("core.distill.losses", "LOSS", Loss)


def total_loss(batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the terms of weight above zero; one that needs a router is left out without one.

    Returns:
        The scalar to minimise, and every term's value before its weight: a scalar that is still
        on the device, since reading it would wait for all that was asked of the device before.
    """
    total = batch.student.new_zeros(())
    values = {}
    for name, loss in losses().items():
        if not weights[name] or (loss.needs_router and batch.log_weights is None):
            continue
        term = loss.compute(batch)
        total = total + weights[name] * term
        values[name] = term.detach()
    return total, values
