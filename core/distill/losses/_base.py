"""What a loss term sees, and how its plugin hands it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from core.registry import scan


@dataclass(frozen=True)
class Batch:
    """One batch, as every term sees it."""

    student: Tensor
    """[B, d] the student's vectors."""
    teacher: Tensor
    """[B, d] the teacher's, constant."""
    candidates: Tensor
    """[M, d] targets to retrieve among, constant."""
    log_weights: Tensor | None = None
    """[B, C] log of the student's router, or none."""
    weights: Tensor | None = None
    """[B, C] the teacher's weights over the clusters."""

    @cached_property
    def angles(self) -> Tensor:
        """``squared_angles``, which several terms look at."""
        return squared_angles(self)


@dataclass(frozen=True)
class Loss:
    """A plugin: a term, and whether it needs a learnt router."""

    compute: Callable[[Batch], Tensor]
    """-> a scalar."""
    needs_router: bool = False


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


def squared_angles(batch: Batch) -> Tensor:
    """Squared angle between student and teacher: [B], rad^2; zero if and only if parallel.

    2 atan2(|x - y|, |x + y|) of unit vectors (Kahan 2006, section 12) is exact at both ends. acos
    of a clamped cosine loses half the digits near 0 and has no gradient where it is clamped.
    """
    x = functional.normalize(batch.student, dim=-1)
    y = functional.normalize(batch.teacher, dim=-1)
    apart = (x - y).square().sum(-1)
    # The square of a root: its own derivative at 0 is finite, the root's is not.
    smallest = torch.finfo(x.dtype).tiny
    half = torch.atan2(apart.clamp(min=smallest).sqrt(), (x + y).norm(dim=-1))
    return (2 * half).square()
