"""Document 004's functions: losses between vectors of any widths, their mixtures, curriculum steps.

The teacher is constant: no gradient goes to it. Bad arguments raise SpecInvalid or DataInvalid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from core.distill import relational
from core.distill.checkpoints import load_teacher_checkpoint, resolve_device
from core.errors import DataInvalid, SpecInvalid
from core.rotations.sphere import unit
from core.specs.distillation import (
    CURRICULUM_CONFIG,
    DEFAULT_OPENAI_CONFIG,
    FAST_CONFIG,
    DistillationConfig,
    get_tau_for_stage,
)
from core.specs.schedules import TauSchedule, check_tau, create_curriculum_schedule, told

__all__ = [
    "CURRICULUM_CONFIG",
    "DEFAULT_OPENAI_CONFIG",
    "FAST_CONFIG",
    "DistillationConfig",
    "TauSchedule",
    "combined_distill_loss",
    "create_curriculum_schedule",
    "curriculum_distill_step",
    "distill_loss",
    "get_tau_for_stage",
    "kl_distill_loss",
    "load_teacher_checkpoint",
    "resolve_device",
]

Method = Literal["cosine", "relational_kl", "rkd_distance", "rkd_angle", "gram"]
CustomLoss: TypeAlias = Callable[..., Tensor]
"""``(student_vec, teacher_vec, *, tau) -> scalar``: a loss of one's own."""
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["forward", "reverse", "jsd"]


def distill_loss(
    student_vec: Tensor,
    teacher_vec: Tensor,
    tau: float = 1.0,
    *,
    method: Method | CustomLoss | None = None,
) -> Tensor:
    """How far the student's vectors are from the teacher's, of equal or of different widths.

    Vectors of different widths have no angle between them, so their relations inside the batch are
    compared: document 004's (32, 5) against (32, 1536).

    Args:
        student_vec: [B, k] floating, of any length.
        teacher_vec: [B, D] floating, constant.
        tau: 1e-6 to 1e3; temperature of ``relational_kl`` (see there what it changes). The
            other methods have no temperature.
        method: None: ``cosine`` for equal widths, else ``relational_kl``. ``cosine``: mean of
            1 - cos (1/2 for a zero row), equal widths alone, B >= 1. Of
            ``core.distill.relational``, B >= 2: ``relational_kl``, ``rkd_distance``, ``rkd_angle``,
            ``gram``. Or a function of one's own, called as ``method(student_vec, teacher_vec,
            tau=tau)``.

    Returns:
        A scalar >= 0; of ``cosine`` at most 2.

    Raises:
        DataInvalid: shapes, dtypes or devices. SpecInvalid: tau or method.
    """
    check_tau("tau", tau)
    relational.check_batch(student_vec, teacher_vec, least=1)
    teacher_vec = teacher_vec.detach()
    if callable(method):
        return method(student_vec, teacher_vec, tau=tau)
    if method is None:
        alike = student_vec.shape == teacher_vec.shape
        method = "cosine" if alike else "relational_kl"
    if method not in get_args(Method):
        raise SpecInvalid(
            f"method {method!r}; allowed: {', '.join(get_args(Method))}, or a function",
            pointer="/method",
        )
    if method == "relational_kl":
        return relational.relational_kl(student_vec, teacher_vec, tau=tau)
    return _UNTEMPERED[method](student_vec, teacher_vec)


def kl_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 1.0,
    reduction: Reduction = "mean",
    *,
    direction: Direction = "forward",
) -> Tensor:
    """Divergence of softmax(logits / tau), times tau^2 (Hinton et al. 2015, section 2).

    Zero if and only if both distributions agree. A logit of -inf is a class that cannot be: both
    may have it; where the teacher alone allows a class, the forward divergence is infinite.

    Args:
        student_logits: [..., K] floating, K >= 2.
        teacher_logits: [..., K] floating, the same shape; constant.
        tau: 1e-6 to 1e3.
        reduction: ``mean``: over the rows (all axes but the last), what torch calls ``batchmean``;
            a mean over the K classes too would be K times too small. ``sum``: over the rows.
            ``none``: [...], one number a row.
        direction: ``forward``: KL(teacher || student). ``reverse``: KL(student || teacher).
            ``jsd``: half of each to their mean (Jensen and Shannon), at most tau^2 log 2.

    Returns:
        In nats, at least float32.

    Raises:
        DataInvalid: shapes, dtypes or devices. SpecInvalid: tau, reduction or direction.
    """
    check_tau("tau", tau)
    for name, value, allowed in (
        ("reduction", reduction, get_args(Reduction)),
        ("direction", direction, get_args(Direction)),
    ):
        if value not in allowed:
            raise SpecInvalid(
                f"{name} {value!r}; allowed: {', '.join(allowed)}", pointer=f"/{name}"
            )
    _check_logits(student_logits, teacher_logits)
    wide = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    wide = torch.promote_types(wide, torch.float32)
    student = (student_logits.to(wide) / tau).log_softmax(-1)
    teacher = (teacher_logits.detach().to(wide) / tau).log_softmax(-1)
    rows = tau**2 * _DIRECTIONS[direction](student, teacher)
    return _REDUCTIONS[reduction](rows)


def combined_distill_loss(
    student_vec: Tensor,
    teacher_vec: Tensor,
    reconstruction_loss: Tensor | float,
    alpha: float = 0.7,
    tau: float = 1.0,
    *,
    method: Method | CustomLoss | None = None,
) -> Tensor:
    """Return alpha * distill_loss + (1 - alpha) * reconstruction_loss (document 004).

    Args:
        student_vec: [B, k], as of ``distill_loss``.
        teacher_vec: [B, D].
        reconstruction_loss: a finite scalar, whatever it measures; its gradient is kept.
        alpha: in [0, 1]: 1 is distillation alone.
        tau: as of ``distill_loss``.
        method: as of ``distill_loss``.

    Raises:
        DataInvalid: shapes, dtypes or devices. SpecInvalid: alpha, tau or method.
    """
    _check_alpha(alpha)
    other = _scalar("reconstruction_loss", reconstruction_loss)
    loss = distill_loss(student_vec, teacher_vec, tau, method=method)
    return alpha * loss + (1 - alpha) * other


def curriculum_distill_step(
    student_vec: Tensor,
    teacher_vec: Tensor,
    stage: int,
    tau_schedule: Callable[[int], float],
    alpha: float = 0.7,
    reconstruction_loss: Tensor | float | None = None,
    *,
    method: Method | CustomLoss | None = None,
) -> tuple[Tensor, float]:
    """Compute the combined loss at a stage's temperature.

    Args:
        student_vec: [B, k], as of ``distill_loss``.
        teacher_vec: [B, D].
        stage: from 0.
        tau_schedule: from a stage to its temperature: ``create_curriculum_schedule``'s, a config's
            ``get_tau_for_stage``, or one's own.
        alpha: in [0, 1].
        reconstruction_loss: a finite scalar; None: there is none, it counts as 0, and the loss is
            alpha times the distillation loss.
        method: as of ``distill_loss``.

    Returns:
        The loss, and the temperature it was computed at.

    Raises:
        DataInvalid: shapes, dtypes or devices. SpecInvalid: alpha, stage, method or temperature.
    """
    if not callable(tau_schedule):
        raise SpecInvalid(
            f"tau_schedule {tau_schedule!r}; allowed: a function from stage to temperature",
            pointer="/tau_schedule",
        )
    tau = tau_schedule(stage)
    check_tau("tau", tau)
    other = 0.0 if reconstruction_loss is None else reconstruction_loss
    loss = combined_distill_loss(student_vec, teacher_vec, other, alpha, tau, method=method)
    return loss, tau


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared chord, which is 1 - cos and keeps its digits near 0."""
    if student.shape != teacher.shape:
        raise DataInvalid(
            f"student_vec: {student.shape[1]} wide beside teacher_vec's {teacher.shape[1]}; method "
            "'cosine' needs equal widths (relational_kl, rkd_distance, rkd_angle, gram do not)",
            pointer="/student_vec",
        )
    return (unit(student) - unit(teacher)).square().sum(1).mean() / 2


_UNTEMPERED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "rkd_distance": relational.rkd_distance,
    "rkd_angle": relational.rkd_angle,
    "gram": relational.gram,
}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis; a class that p excludes adds nothing."""
    excluded = log_p.isneginf()
    gaps = log_p.masked_fill(excluded, 0) - log_q.masked_fill(excluded, 0)
    return (log_p.exp() * gaps).sum(-1)


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    # Where both exclude a class, so does the middle; its gradient would be NaN there.
    excluded = student.isneginf() & teacher.isneginf()
    middle = torch.logaddexp(student.masked_fill(excluded, 0), teacher.masked_fill(excluded, 0))
    middle = middle - math.log(2)
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


_DIRECTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": lambda student, teacher: _kl(teacher, student),
    "reverse": _kl,
    "jsd": _jsd,
}
_REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda rows: rows,
}


def _check_logits(student: Any, teacher: Any) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise DataInvalid(
                f"{name}: a {type(logits).__name__}; needed a tensor [..., K]", pointer=f"/{name}"
            )
        shape = list(logits.shape)
        if not logits.is_floating_point() or not shape or shape[-1] < 2 or not logits.numel():
            raise DataInvalid(
                f"{name}: {logits.dtype} of shape {shape}; needed floating [..., K >= 2], not "
                "empty",
                pointer=f"/{name}",
            )
    if student.shape != teacher.shape or student.device != teacher.device:
        raise DataInvalid(
            f"teacher_logits: {list(teacher.shape)} on {teacher.device} beside student_logits "
            f"{list(student.shape)} on {student.device}; both need the same",
            pointer="/teacher_logits",
        )


def _check_alpha(alpha: Any) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise SpecInvalid(f"alpha {alpha!r}; allowed: a number, 0 to 1", pointer="/alpha")


def _scalar(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor):
        scalar = value.ndim == 0 and value.is_floating_point()
        if scalar and value.isfinite():
            return value
        what = f"{value.item()}" if scalar else f"{value.dtype} of shape {list(value.shape)}"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) <= sys.float_info.max:
            return float(value)
        what = f"a {type(value).__name__} {told(value)}"
    raise DataInvalid(f"{name}: {what}; needed a finite floating scalar", pointer=f"/{name}")
