"""How alike the relations inside a batch are: what vectors of different widths can be compared by.

Pure functions of two tensors, differentiable in both. Only relations between rows enter, so the
widths need not agree. All return a scalar >= 0, in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from core.errors import DataInvalid
from core.rotations.sphere import unit
from core.specs.schedules import check_tau

ANGLE_ENTRIES = 2**18
"""Cosines of triples that ``rkd_angle`` holds at a time, at least one middle row's B^2."""
NEAR = 0.05
"""Cosines apart by this differ by a factor e as neighbours, at a temperature of 1. Measured on
WordNet's queries (5-D, 500 steps): about what a perplexity of 10 to 15 comes to."""
SAME = 1e-12
"""Squared distance, of the batch's mean, up to which two rows count as one: no direction."""


def relational_kl(student: Tensor, teacher: Tensor, *, tau: float) -> Tensor:
    """KL(teacher || student) of who resembles whom in the batch, times tau^2 (document 004).

    Row i of the teacher's relations is the softmax over j != i of cos(t_i, t_j) / tau; the
    student's likewise. Zero if and only if the off-diagonal cosines of both agree up to one
    constant; of 2 rows each has but one other, so their relations always agree. tau^2 keeps the
    gradient's size (Hinton et al. 2015, section 2): over tau in [0.5, 4] its norm changes by less
    than a factor of 2, and for a large tau the value tends to half the mean squared difference of
    the cosines, centred by row. So tau is no matter of size but of attention: above about 0.5 all
    pairs count alike, far below it (0.05) only the nearest neighbours do.

    Args:
        student: [B, k] floating, of any length; B >= 2.
        teacher: [B, D] floating.
        tau: of the cosines, 1e-6 to 1e3.

    Returns:
        A scalar in nats, the mean over the rows.

    Raises:
        DataInvalid: shapes or dtypes. SpecInvalid: tau.
    """
    check_tau("tau", tau)
    check_batch(student, teacher)
    ours, theirs = (_others(cosines(vectors)) for vectors in (student, teacher))  # [B, B - 1]
    # In float64: tau^2 would make float32's rounding visible.
    found = functional.log_softmax(ours.double() / tau, dim=1)
    wanted = functional.log_softmax(theirs.double() / tau, dim=1)
    divergence: Tensor = tau**2 * (wanted.exp() * (wanted - found)).sum(1).mean()
    return divergence.to(ours.dtype)


def neighbour_kl(student: Tensor, teacher: Tensor, *, tau: float) -> Tensor:
    """KL(teacher || student) of who is near whom in the batch, times tau^2.

    Row i of the teacher is the softmax over j != i of cos(t_i, t_j) / (NEAR tau); that of the
    student of ``-(k / 2) log(1 + |s_i - s_j|^2 / (k - 1)) / tau``: a Student t kernel of k - 1
    degrees of freedom (van der Maaten 2009, parametric t-SNE), which lets a narrow code keep what
    is near near although it has no room for all that is far. ``relational_kl`` looks at
    cosines on both sides and, above a temperature of 0.5, at all pairs alike. Not zero where the
    relations agree, for the kernels differ. tau^2 keeps the size of a fresh student's gradient over
    tau in [0.5, 4] to a factor of 1.6 on WordNet's queries; where rows lie in tight clusters even 4
    is cool, and it grows up to 8 times.

    Args:
        student: [B, k] floating; B >= 2.
        teacher: [B, D] floating, of any length.
        tau: 1e-6 to 1e3.

    Returns:
        A scalar in nats, the mean over the rows.

    Raises:
        DataInvalid: shapes or dtypes. SpecInvalid: tau.
    """
    check_tau("tau", tau)
    check_batch(student, teacher)
    theirs = functional.log_softmax(_others(cosines(teacher)).double() / (NEAR * tau), dim=1)
    width = student.shape[1]
    wide = student.to(torch.promote_types(student.dtype, torch.float32))
    wide = wide - wide.mean(0)  # far from the origin differences would lose their digits
    squares = wide.square().sum(1)
    apart = (squares[:, None] + squares - 2 * wide @ wide.T).clamp(min=0)
    kernel = -(width / 2) * torch.log1p(_others(apart) / max(1, width - 1))
    ours = functional.log_softmax(kernel.double() / tau, dim=1)
    divergence: Tensor = tau**2 * (theirs.exp() * (theirs - ours)).sum(1).mean()
    return divergence.to(wide.dtype)


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs of different rows.

    Zero if and only if the cosines agree.

    Args:
        student: [B, k] floating, of any length; B >= 2.
        teacher: [B, D] floating.

    Returns:
        A scalar in [0, 4].
    """
    check_batch(student, teacher)
    return (_others(cosines(student)) - _others(cosines(teacher))).square().mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber difference of the distances between rows, each by its batch's mean distance.

    Park et al. 2019 (Relational Knowledge Distillation), equations 4 to 6, averaged over the
    pairs where they sum. Zero if and only if the distances agree up to one factor. Lengths of the
    vectors count, their common scale does not; rows that are all equal are at distance 0.

    Args:
        student: [B, k] floating; B >= 2.
        teacher: [B, D] floating.

    Returns:
        A scalar, without unit.
    """
    check_batch(student, teacher)
    ours, theirs = _distances(student), _distances(teacher)
    return functional.smooth_l1_loss(*_alike(ours, theirs))


def rkd_angle(student: Tensor, teacher: Tensor, *, entries: int = ANGLE_ENTRIES) -> Tensor:
    """Huber difference of the cosines of the angles that every three rows enclose.

    Park et al. 2019, equations 7 and 8: the angle at row j between rows i and k, averaged over
    i, j, k all different; 2 rows enclose none, so it is 0. Zero if and only if the angles agree;
    an equal row has no direction, which counts as a cosine of 0.

    There are B^3 cosines. They are made for as many middle rows at a time as ``entries`` allows,
    each block with its gradient (of a scalar, so backward only scales it) before the next one: a
    handful of [b, B, B] and [B, B] are held, whatever B is. Differences come from float64 Gram
    matrices of the centred rows: no [B, B, D] is ever formed. Differentiable once.

    Args:
        student: [B, k] floating; B >= 2.
        teacher: [B, D] floating.
        entries: cosines held at a time, of each side; at least B^2 are.

    Returns:
        A scalar, without unit.
    """
    check_batch(student, teacher)
    B = len(student)
    answer = torch.promote_types(student.dtype, torch.float32)
    if B < 3:
        return student.sum().to(answer) * 0.0
    ours, theirs = _centred_gram(student), _centred_gram(teacher)
    whole: Tensor = _AngleGaps.apply(ours, theirs, max(1, entries // B**2))  # type: ignore[no-untyped-call]
    return (whole / (B * (B - 1) * (B - 2))).to(answer)


def cosines(vectors: Tensor) -> Tensor:
    """Cosines of all pairs of rows: [B, d] to [B, B], at least float32; a zero row's are 0."""
    units = unit(vectors)
    return units @ units.T


def check_batch(student: Tensor, teacher: Tensor, *, least: int = 2) -> None:
    """Raise DataInvalid unless both are floating [B, any], B >= least, on one device."""
    for name, vectors in (("student_vec", student), ("teacher_vec", teacher)):
        if not isinstance(vectors, Tensor):
            raise DataInvalid(
                f"{name}: a {type(vectors).__name__}; needed a tensor [B, d]", pointer=f"/{name}"
            )
        if vectors.ndim != 2 or not vectors.shape[1] or not vectors.is_floating_point():
            raise DataInvalid(
                f"{name}: {vectors.dtype} of shape {list(vectors.shape)}; needed floating [B, d]",
                pointer=f"/{name}",
            )
    if len(student) != len(teacher):
        raise DataInvalid(
            f"teacher_vec: {len(teacher)} rows beside student_vec's {len(student)}; both need the "
            "same",
            pointer="/teacher_vec",
        )
    if len(student) < least:
        raise DataInvalid(
            f"student_vec: {len(student)} rows; needed at least {least}, relations are between "
            "rows (leave a batch of 1 out, or join it to another)",
            pointer="/student_vec",
        )
    if student.device != teacher.device:
        raise DataInvalid(
            f"teacher_vec: on {teacher.device}, student_vec on {student.device}; move one",
            pointer="/teacher_vec",
        )


def _others(matrix: Tensor) -> Tensor:
    """[B, B] without its diagonal: [B, B - 1]. No infinities, whose differences would be NaN."""
    B = len(matrix)
    return matrix.flatten()[1:].view(B - 1, B + 1)[:, :-1].reshape(B, B - 1)


def _distances(vectors: Tensor) -> Tensor:
    """Distances of all pairs i < j, by their mean: [B (B - 1) / 2], at least float32."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    # The gradient of a distance of 0 is 0 here, not infinite.
    distances = functional.pdist(wide)
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean))


def _alike(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    return ours.to(wide), theirs.to(wide)


def _centred_gram(vectors: Tensor) -> Tensor:
    """[B, B] float64 inner products around the mean row; differences of rows lose no digits."""
    wide = vectors.double()
    wide = wide - wide.mean(0)
    return wide @ wide.T


class _AngleGaps(torch.autograd.Function):
    """Sum of the Huber differences at all middle rows, from two Gram matrices."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, step: int) -> Tensor:
        """Add up blocks of ``step`` middle rows and their gradients."""
        grams = [
            gram.detach().requires_grad_(needed)
            for gram, needed in zip((ours, theirs), ctx.needs_input_grad, strict=False)
        ]
        wanted = [gram for gram in grams if gram.requires_grad]
        gradients = [torch.zeros_like(gram) for gram in wanted]
        whole = ours.new_zeros(())
        for start in range(0, len(ours), step):
            with torch.enable_grad():
                block = _angle_block(*grams, middles=range(start, min(start + step, len(ours))))
            whole += block.detach()
            steps = torch.autograd.grad(block, wanted) if wanted else ()
            for gradient, more in zip(gradients, steps, strict=True):
                gradient += more
        ctx.save_for_backward(*gradients)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward found."""
        gradients = iter(ctx.saved_tensors)
        return tuple(grad * next(gradients) if needed else None for needed in ctx.needs_input_grad)


def _angle_block(ours: Tensor, theirs: Tensor, *, middles: range) -> Tensor:
    """Sum of the Huber differences at some middle rows."""
    rows = torch.arange(middles.start, middles.stop, device=ours.device)
    # Sides that are the middle row itself have no direction, so 0 on both: only i = k is left out.
    found, wanted = (_angles(inner, rows) for inner in (ours, theirs))  # [b, B, B]
    return _huber(found, wanted) - _huber(*(c.diagonal(dim1=1, dim2=2) for c in (found, wanted)))


def _huber(found: Tensor, wanted: Tensor) -> Tensor:
    return functional.smooth_l1_loss(found, wanted, reduction="sum")


def _angles(inner: Tensor, rows: Tensor) -> Tensor:
    """Cosines at each middle row between all pairs of rows: [b, B, B]."""
    own = inner.diagonal()
    squared = own[rows, None] + own - 2 * inner[rows]  # [b, B]
    kept = squared > SAME * own.mean()
    # Inside the root as well: the gradient of what is thrown away must be finite too.
    inverse = torch.where(kept, squared, torch.ones_like(squared)).rsqrt() * kept
    to = inner[rows]
    products = inner - to[:, :, None] - to[:, None, :] + own[rows, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]
