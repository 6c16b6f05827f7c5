"""What a loss term sees, and how its plugin hands it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from core.errors import SpecInvalid
from core.registry import LOSS_PLUGINS, installed, scan
from core.rotations.sphere import squared_angles


@dataclass(frozen=True)
class Batch:
    """One batch, as every term sees it."""

    student: Tensor
    """[B, k] the student's vectors; of any length where it keeps the query's."""
    teacher: Tensor
    """[B, d] the teacher's, constant; k is d but for terms that compare relations."""
    candidates: Tensor | None = None
    """[M, d] targets to retrieve among, constant; None where no term asked for them."""
    log_weights: Tensor | None = None
    """[B, C] log of the student's router, or none."""
    weights: Tensor | None = None
    """[B, C] the teacher's weights over the clusters."""
    decoded: Tensor | None = None
    """[B, d] the student's vectors brought back by its decoder, or none."""
    tau: float = 1.0
    """Temperature of the terms that have one."""
    levels: tuple[tuple[int, float], ...] = ()
    """Nested codes: how many of the student's first columns, and their weight; () for all."""

    def codes(self) -> list[tuple[Tensor, float]]:
        """Return every nested code [B, k'] of the student with its weight."""
        levels = self.levels or ((self.student.shape[1], 1.0),)
        return [(self.student[:, :width], weight) for width, weight in levels]

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
    needs_lengths: bool = False
    """Whether it reads lengths, which a student that keeps the query's gives only if asked."""


def losses() -> Mapping[str, Loss]:
    """Return every term by name: the files here, and what is installed under LOSS_PLUGINS."""
    found = scan("core.distill.losses", "LOSS", Loss)
    return {**installed(LOSS_PLUGINS, Loss), **found}


def weighed(weights: Mapping[str, float]) -> dict[str, Loss]:
    """Return the terms of weight above zero.

    Raises:
        SpecInvalid: there is no such term here.
    """
    known = losses()
    for name, weight in weights.items():
        if weight and name not in known:
            raise SpecInvalid(
                f"training.losses.custom.{name}: no such term on this worker; allowed: "
                f"{', '.join(sorted(known))}",
                pointer=f"/training/losses/custom/{name}",
            )
    return {name: known[name] for name in sorted(weights) if weights[name]}


def total_loss(batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the terms of weight above zero; one that needs a router is left out without one.

    Returns:
        The scalar to minimise, and every term's value before its weight: a scalar that is still
        on the device, since reading it would wait for all that was asked of the device before.

    Raises:
        SpecInvalid: there is no such term here, or it gives no scalar.
    """
    total = batch.student.new_zeros(())
    values = {}
    for name, loss in weighed(weights).items():
        if loss.needs_router and batch.log_weights is None:
            continue
        term = _scalar(name, loss.compute(batch))
        total = total + weights[name] * term
        values[name] = term.detach()
    return total, values


def _scalar(name: str, found: Any) -> Tensor:
    """Return what a term gave, which nobody has checked where a plug-in brings it."""
    if isinstance(found, Tensor) and found.shape == () and found.is_floating_point():
        return found
    what = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
    raise SpecInvalid(
        f"training.losses.custom.{name}: gave {what or type(found).__name__}; needed a floating "
        "scalar tensor",
        pointer=f"/training/losses/custom/{name}",
    )
