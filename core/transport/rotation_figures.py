"""What a fit says of itself, from moments alone: errors of orthogonality, cosines before and after.

The cosine here is of all rows laid end to end, ``tr(A^T X^T Y) / (|X A| |Y|)``: long rows count for
more. The mean over rows needs rows, and is the evaluation's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.specs.transport import Rotate
from core.transport.moments import Moments
from core.transport.polar import deviation
from core.transport.rotations import Rotation, Unwhitened


def fit_figures(
    found: Rotation | Unwhitened,
    moments: Mapping[str, Moments],
    options: Rotate,
    *,
    held_out: Mapping[str, Moments] | None,
) -> dict[str, Any]:
    """Return JSON values: ``k``, ``errors``, ``det`` and, by site, the cosines.

    ``before`` compares the streams as they are, the narrower one padded with zeros. Cosines are of
    uncentred moments whatever the fit took out, for it is those that a fold turns.
    """
    figures: dict[str, Any] = {
        "group": found.group,
        "k": found.core.shape[0],
        "orthogonal": found.orthogonal,
        "tie": options.tie,
        "pca": options.pca,
        "centre": options.centre,
        "whiten": options.whiten,
        "errors": errors(found),
        "det": determinant(found),
        "sites": {site: _cosines(found, each, None) for site, each in moments.items()},
    }
    for site, each in (held_out or {}).items():
        figures["sites"].setdefault(site, {}).update(_cosines(found, each, "held_out"))
    return figures


def errors(found: Rotation | Unwhitened) -> dict[str, float]:
    """Return max abs deviations from what must hold exactly.

    ``core``: ``R~^T R~ - I``. ``bases``: of both. ``lift``: ``R R^T - P_s P_s^T``, R the lift, a
    partial isometry. ``rows``: ``R R^T - I``, R the completed map; ``columns``: ``R^T R - I``,
    of a square one alone. Of an un-whitened map ``rows`` is how far it is from a rotation.
    """
    bases = (found.student_basis, found.teacher_basis)
    told = {
        "core": deviation(found.core.mT @ found.core),
        "bases": max(deviation(basis.mT @ basis) for basis in bases),
    }
    if isinstance(found, Unwhitened):
        return {**told, "rows": deviation(found.matrix @ found.matrix.mT)}
    lifted, student = found.lifted, found.student_basis
    told["lift"] = float((lifted @ lifted.mT - student @ student.mT).abs().max())
    told["rows"] = deviation(found.full @ found.full.mT)
    if found.full.shape[0] == found.full.shape[1]:
        told["columns"] = deviation(found.full.mT @ found.full)
    return told


def determinant(found: Rotation | Unwhitened) -> float | None:
    """Return +1 or -1; None of a map that is not square or not orthogonal."""
    if isinstance(found, Unwhitened) or found.full.shape[0] != found.full.shape[1]:
        return None
    return float(torch.linalg.slogdet(found.full).sign)


def _cosines(found: Rotation | Unwhitened, of: Moments, prefix: str | None) -> dict[str, float]:
    """Return the rows' weight, and the cosines before, after, and of the shared k dimensions."""
    xx, yy, xy = of.xx.double(), of.yy.double(), of.xy.double()
    both = min(xy.shape)
    length_x, length_y = float(xx.trace()) ** 0.5, float(yy.trace()) ** 0.5
    told = {
        "n": float(of.n),
        "before": _ratio(float(xy[:both, :both].trace()), length_x * length_y),
    }
    if isinstance(found, Unwhitened):
        told["after"] = _affine_cosine(found, of)
    else:
        seen = found.full[:, : xy.shape[1]]  # the padded columns of a wider student meet zeros
        told["after"] = _ratio(float((seen * xy).sum()), length_x * length_y)
        told["shared"] = _shared(found, xx, yy, xy)
    return {name if prefix is None else f"{prefix}_{name}": value for name, value in told.items()}


def _shared(found: Rotation, xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    """Cosine of both sides' k coordinates, the rest left out of both lengths."""
    student, teacher = found.student_basis, found.teacher_basis
    inner = float((found.lifted * xy).sum())
    length_x = float((student.mT @ xx @ student).trace()) ** 0.5
    length_y = float((teacher.mT @ yy @ teacher).trace()) ** 0.5
    return _ratio(inner, length_x * length_y)


def _affine_cosine(found: Unwhitened, of: Moments) -> float:
    """The same of ``x A + b``: sums of rows are moments too."""
    A, b, n = found.matrix, found.offset, float(of.n)
    sum_x, sum_y = of.sum_x.double(), of.sum_y.double()
    inner = float((A * of.xy.double()).sum() + b @ sum_y)
    mapped = float((A.mT @ of.xx.double() @ A).trace() + 2 * (sum_x @ A) @ b + n * b @ b)
    return _ratio(inner, (max(mapped, 0.0) * float(of.yy.double().trace())) ** 0.5)


def _ratio(inner: float, lengths: float) -> float:
    return inner / lengths if lengths > 0 else 0.0
