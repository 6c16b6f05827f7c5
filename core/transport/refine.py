"""At most two Householder reflections that a rotation lacks, in closed form, or why there are none.

Document 002, section 7. A reflection ``H = I - 2 v v^T`` after R changes ``tr(R^T C)`` by
``-2 v^T (R^T C) v``, so only a negative eigenvalue of the symmetric part of ``R^T C`` has anything
to gain, and its eigenvector gains most. At a Procrustes optimum ``R^T C`` is positive
semidefinite: reflections help where a tie, a cut of the rank or a sign kept R from it. Where widths
differ, principal directions of the wider side are such a cut, whatever k is; joint ones are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.specs.transport import Refine
from core.transport.rotations import Rotation

OPTIMUM = "Procrustes optimum: R^T C is positive semidefinite, no reflection can gain"
ASKED_NONE = "reflections is 0: none was asked for"


@dataclass(frozen=True)
class _Step:
    vector: Tensor
    """[d_r], unit length."""
    eigenvalue: float
    gain: float
    """In tr(R^T C), measured."""


def refine(
    rotation: Rotation, cross: Tensor, options: Refine, *, det: Literal["any", "positive"]
) -> tuple[Rotation, dict[str, Any]]:
    """Compose a rotation with the reflections that raise ``tr(R^T C)`` most.

    Each next reflection is fitted to what the one before it left. Where ``det`` is positive and the
    rotation square they come in pairs or not at all, whose second may lose less than the first won.

    Args:
        rotation: R, [d_s, d_r].
        cross: C, ``rotate.cross_moment`` of the sites it is to serve, [d_s, d_r].
        options: at most how many.
        det: as in the solve.

    Returns:
        The rotation (the same one where nothing gains) and JSON values: ``reflections`` applied,
        their ``eigenvalues``, ``predicted`` and ``measured`` gain, ``before``, and ``skipped``: why
        none was, or None.

    Raises:
        DataInvalid: the moment is of other widths, or not finite.
    """
    if cross.shape != rotation.full.shape or not bool(cross.isfinite().all()):
        raise DataInvalid(
            f"{rotation.group}: a cross-moment of shape {list(cross.shape)}; needed finite numbers "
            f"of shape {list(rotation.full.shape)}"
        )
    C = cross.double()
    before = float((rotation.full * C).sum())
    square = rotation.full.shape[0] == rotation.full.shape[1]
    steps, skipped = _choose(
        rotation.full.mT @ C, options.reflections, pairs=det == "positive" and square
    )
    found = _reflected(rotation, C, [step.vector for step in steps]) if steps else rotation
    return found, {
        "reflections": len(steps),
        "eigenvalues": [step.eigenvalue for step in steps],
        "before": before,
        "predicted": -2 * sum(step.eigenvalue for step in steps),
        "measured": float((found.full * C).sum()) - before,
        "skipped": skipped,
    }


def _choose(A: Tensor, most: int, *, pairs: bool) -> tuple[list[_Step], str | None]:
    """Return the reflections worth taking, and why there are none.

    Args:
        A: R^T C, [d_r, d_r].
        most: of reflections.
        pairs: whether an odd number is forbidden.
    """
    if not most:
        return [], ASKED_NONE
    # Rounding of an optimum leaves eigenvalues of this size below zero.
    noise = torch.finfo(A.dtype).eps * len(A) * float(torch.linalg.matrix_norm(A))
    steps: list[_Step] = []
    while len(steps) < most:
        step = _best(A)
        if not pairs and step.gain <= noise:
            break
        steps.append(step)
        A = A - 2 * torch.outer(step.vector, step.vector @ A)
    if not steps:
        return [], OPTIMUM
    if pairs and (len(steps) < 2 or sum(step.gain for step in steps) <= noise):
        return [], _no_pair(steps, noise)
    return steps, None


def _best(A: Tensor) -> _Step:
    """The reflection that gains most, whatever its sign."""
    values, vectors = torch.linalg.eigh((A + A.mT) / 2)
    v = vectors[:, 0]
    return _Step(v, float(values[0]), -2 * float(v @ A @ v))


def _no_pair(steps: list[_Step], noise: float) -> str:
    first = steps[0]
    if first.gain <= noise:
        return OPTIMUM
    pair = sum(step.gain for step in steps) if len(steps) == 2 else None
    why = "only one was allowed" if pair is None else f"a pair changes it by {pair:.6g}"
    return (
        f"det positive takes reflections in pairs: one alone would raise tr(R^T C) by "
        f"{first.gain:.6g}, and {why}"
    )


def _reflected(rotation: Rotation, cross: Tensor, vectors: list[Tensor]) -> Rotation:
    """Return R H1 H2, its lift turned along.

    Where the student is wider, a reflection of the padded stream would leave the teacher's
    coordinates: there ``R H_v = H_u R`` with ``u = R v`` (R is square) turns the student's basis.
    """
    d_s, d_t = len(rotation.student_basis), len(rotation.teacher_basis)
    full, student, teacher = rotation.full, rotation.student_basis, rotation.teacher_basis
    for v in vectors:
        if d_s > d_t:
            u = full @ v
            student = student - 2 * torch.outer(u, u @ student)
        else:
            teacher = teacher - 2 * torch.outer(v, v @ teacher)
        full = full - 2 * torch.outer(full @ v, v)
    within = student.mT @ cross[:, :d_t] @ teacher
    return replace(
        rotation,
        student_basis=student,
        teacher_basis=teacher,
        full=full,
        singular_values=torch.linalg.svdvals(within),
    )
