"""From moments to rotations: principal subspaces of both sides, Procrustes between them, completed.

Document 002, section 4, in float64. A rotation keeps every direction of the student's stream: the k
shared dimensions turn as Procrustes says, and what they leave over turns by Procrustes on its own,
so ``full`` is orthogonal whatever k is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from core.errors import DataInvalid, SpecInvalid
from core.specs.transport import HELD_OUT_SHARES, Rotate
from core.transport.moments import Moments
from core.transport.polar import Polar, identity, polar, steady_signs
from core.transport.rotation_figures import fit_figures
from core.transport.rotations import Rotation, Unwhitened

TIE = 1e-9
"""Held-out cosines that differ by less are equal: the fewest dimensions are taken."""
Report = Callable[[float, float], None]


@dataclass(frozen=True)
class Pooled:
    """What the sites of one group say together. float64."""

    n: float
    """Sum of the weights."""
    mean_x: Tensor
    """[d_s]"""
    mean_y: Tensor
    """[d_t]"""
    xx: Tensor
    """[d_s, d_s], centred where that was asked for, without the ridge."""
    yy: Tensor
    """[d_t, d_t]"""
    xy: Tensor
    """[d_s, d_t]"""


@dataclass(frozen=True)
class Frames:
    """An orthonormal basis of either side, the leading directions first."""

    student: Tensor
    """[d_s, d_s]"""
    teacher: Tensor
    """[d_t, d_t]"""


@dataclass(frozen=True)
class Turn:
    """A rotation in parts: the shared k dimensions, and the rest."""

    k: int
    core: Polar
    """[k, k]"""
    rest: Polar
    """[d_s - k, d_r - k]"""
    full: Tensor
    """[d_s, d_r]"""
    flipped: str
    """Which part was reflected to make the determinant positive: core, rest, or none."""


def pool(moments: Mapping[str, Moments], *, centre: bool) -> Pooled:
    """Add the moments of a group's sites.

    Args:
        moments: by site, at least one.
        centre: take out every site's own means, which differ from site to site.

    Raises:
        DataInvalid: shapes do not fit together, a number is not finite, no row counts, or one
            side is zero throughout.
    """
    if not moments:
        raise DataInvalid("moments: needed at least one site, got none")
    one, *others = [_checked(site, each) for site, each in moments.items()]
    for other in others:
        if other.xy.shape != one.xy.shape:
            raise DataInvalid(
                f"moments: sites of shape {list(one.xy.shape)} and {list(other.xy.shape)} cannot "
                "share a rotation"
            )
    # One after the other: centred, all together would be every site's moments once more.
    parts = (centred(each) if centre else each for each in (one, *others))
    total = reduce(add, parts)
    for name in ("xx", "yy"):
        whole = sum(float(getattr(each, name).trace()) for each in (one, *others))
        # What centring leaves of equal rows is rounding.
        if not float(getattr(total, name).trace()) > 1e-12 * whole:
            side = "student" if name == "xx" else "teacher"
            raise DataInvalid(f"moments: the {side}'s rows are all zero or all alike")
    n = float(total.n)
    return Pooled(n, total.sum_x / n, total.sum_y / n, total.xx, total.yy, total.xy)


def _checked(site: str, of: Moments) -> Moments:
    d_s, d_t = len(of.sum_x), len(of.sum_y)
    if (of.xx.shape, of.yy.shape, of.xy.shape) != ((d_s, d_s), (d_t, d_t), (d_s, d_t)):
        raise DataInvalid(f"moments of {site}: the shapes of sums and products do not fit")
    wide = Moments(*(sums.double() for sums in of.tensors().values()))
    if not all(bool(sums.isfinite().all()) for sums in wide.tensors().values()):
        raise DataInvalid(f"moments of {site}: a number is not finite")
    if not float(wide.n) > 0:
        raise DataInvalid(f"moments of {site}: no row counts (n is {float(wide.n):g})")
    return wide


def centred(of: Moments) -> Moments:
    """Take the means out of the products; n and the sums stay."""
    x, y, n = of.sum_x, of.sum_y, of.n
    return Moments(
        n,
        x,
        y,
        of.xx - torch.outer(x, x) / n,
        of.yy - torch.outer(y, y) / n,
        of.xy - torch.outer(x, y) / n,
    )


def cross_moment(moments: Mapping[str, Moments], *, centre: bool) -> Tensor:
    """Return what a rotation of this group is fitted to, [d_s, d_r]: d_r = max(d_s, d_t).

    The teacher's stream is padded with zeros where the student is wider. ``refine`` takes it.
    """
    return _padded(pool(moments, centre=centre).xy)


def _padded(cross: Tensor) -> Tensor:
    d_s, d_t = cross.shape
    return torch.nn.functional.pad(cross, (0, max(0, d_s - d_t)))


def solve(
    moments: Mapping[str, Moments],
    options: Rotate,
    group: str,
    *,
    held_out: Mapping[str, Moments] | None = None,
    report: Report = lambda done, total: None,
) -> tuple[Rotation | Unwhitened, dict[str, Any]]:
    """Fit the one map of a group's sites.

    Memory: ``memory.solve_bytes``. Equal moments give equal bytes on one machine
    (see ARCHITECTURE.md, rule 7).

    The ridge turns no principal direction, because ``C + c I`` has the eigenvectors of C. It bounds
    the z-scores of channels that hardly vary, and tells which kept dimensions are below it.

    Args:
        moments: by site, those that share the rotation, of training texts.
        options: how.
        group: its name, ``sites.group_of``.
        held_out: the same sites' moments over other texts: needed where ``k`` is ``held_out``,
            else only scored.
        report: called with steps done and their number, between factorisations.

    Returns:
        A ``Rotation``, or where ``whiten`` an ``Unwhitened``; and JSON values on the fit
        (``rotation_figures.fit_figures``).

    Raises:
        SpecInvalid: k is above the smaller width, or to be chosen without held-out moments.
        DataInvalid: the moments are broken (see ``pool``).
    """
    # One affine map has one mean: z-scores pool the sites first and centre afterwards.
    pooled = pool(moments, centre=options.centre and not options.whiten)
    scores = _Scores(pooled, options.ridge) if options.whiten else None
    fitted = scores.pooled if scores else pooled
    report(1, 4)
    frames = _frames(fitted, options.pca)
    report(2, 4)
    trial = None
    if held_out is not None:
        trial = pool(held_out, centre=options.centre or options.whiten)
        if trial.xy.shape != pooled.xy.shape:
            raise DataInvalid(
                f"held-out moments: shape {list(trial.xy.shape)}; needed {list(pooled.xy.shape)}"
            )
    # What comes from z-scores is no rotation, and has no sign to keep.
    det = "any" if options.whiten else options.det
    k, tried = _choose_k(fitted, frames, options, det, trial, scores)
    turn = _turn(fitted.xy, frames, k, det=det)
    report(3, 4)
    found = _handed_over(group, tuple(moments), frames, turn, scores)
    figures = fit_figures(found, moments, options, held_out=held_out)
    report(4, 4)
    choice = {
        "tried": tried,
        "flipped": turn.flipped,
        **_energy(fitted, frames, k, options.ridge),
    }
    return found, {**figures, **choice}


class _Scores:
    """Moments of z-scores, section 4.1: every channel over its spread, the ridge under the root."""

    def __init__(self, raw: Pooled, ridge: float) -> None:
        self.mean_x, self.mean_y = raw.mean_x, raw.mean_y
        xx = raw.xx - raw.n * torch.outer(raw.mean_x, raw.mean_x)
        yy = raw.yy - raw.n * torch.outer(raw.mean_y, raw.mean_y)
        xy = raw.xy - raw.n * torch.outer(raw.mean_x, raw.mean_y)
        self.scale_x, self.scale_y = _spread(xx, raw.n, ridge), _spread(yy, raw.n, ridge)
        self.pooled = Pooled(
            raw.n,
            torch.zeros_like(raw.mean_x),
            torch.zeros_like(raw.mean_y),
            xx / torch.outer(self.scale_x, self.scale_x),
            yy / torch.outer(self.scale_y, self.scale_y),
            xy / torch.outer(self.scale_x, self.scale_y),
        )

    def undo(self, lifted: Tensor) -> Tensor:
        """Return the matrix [d_s, d_t] between the streams of a lift between z-scores."""
        return lifted / self.scale_x[:, None] * self.scale_y


def _spread(centred_product: Tensor, n: float, ridge: float) -> Tensor:
    variances = centred_product.diagonal().clamp(min=0) / n
    if not float(variances.mean()) > 0:
        raise DataInvalid("moments: every row is alike, so there are no z-scores")
    # Without a ridge a constant channel has spread 0: one rounding of the mean keeps it finite.
    least = max(ridge, torch.finfo(torch.float64).eps) * variances.mean()
    return (variances + least).sqrt()


def _frames(of: Pooled, pca: str) -> Frames:
    if pca == "joint":
        U, _, Vh = torch.linalg.svd(of.xy)
        return Frames(steady_signs(U), steady_signs(Vh.mT))
    sides = [torch.linalg.eigh(moment).eigenvectors.flip(1) for moment in (of.xx, of.yy)]
    return Frames(steady_signs(sides[0]), steady_signs(sides[1]))


def _choose_k(
    fitted: Pooled,
    frames: Frames,
    options: Rotate,
    det: str,
    held_out: Pooled | None,
    scores: _Scores | None,
) -> tuple[int, list[dict[str, float]]]:
    """Return k, and where it was chosen the held-out cosine of every one that was tried."""
    most = min(fitted.xy.shape)
    if options.k is None:
        return max(1, int(options.shrink * most + 1e-9)), []
    if options.k != "held_out":
        if options.k > most:
            raise SpecInvalid(
                f"k is {options.k}; allowed 1 to {most}, the smaller width", pointer="/rotate/k"
            )
        return options.k, []
    if held_out is None:
        raise SpecInvalid("k held_out needs texts to hold out", pointer="/rotate/k")
    tried = []
    for k in sorted({max(1, round(share * most)) for share in HELD_OUT_SHARES}):
        # Unnamed, so that one is gone before the next is made.
        cosine = _score(_turn(fitted.xy, frames, k, det=det), frames, held_out, scores)
        tried.append({"k": k, "held_out_cosine": cosine})
    # Where the rest turns as the core would have it (joint frames), all are equal but for rounding.
    best = max(each["held_out_cosine"] for each in tried)
    return min(int(each["k"]) for each in tried if each["held_out_cosine"] >= best - TIE), tried


def _score(turn: Turn, frames: Frames, on: Pooled, scores: _Scores | None) -> float:
    """Cosine of all mapped rows, laid end to end, with the teacher's."""
    if scores is None:
        matrix, cross = turn.full, _padded(on.xy)
        mapped = float(on.xx.trace())
    else:
        matrix, cross = scores.undo(_lift(frames, turn)), on.xy
        mapped = float((matrix.mT @ on.xx @ matrix).trace())
    lengths: float = (mapped * float(on.yy.trace())) ** 0.5
    return float((matrix * cross).sum()) / lengths if lengths > 0 else 0.0


def _lift(frames: Frames, turn: Turn) -> Tensor:
    return frames.student[:, : turn.k] @ turn.core.factor @ frames.teacher[:, : turn.k].mT


def _turn(cross: Tensor, frames: Frames, k: int, *, det: str) -> Turn:
    """Procrustes within the leading k directions, and within all that they leave over."""
    d_s, d_t = cross.shape
    d_r = max(d_s, d_t)
    teacher = torch.block_diag(frames.teacher, identity(d_r - d_t, d_r - d_t, cross))
    between = frames.student.mT @ _padded(cross) @ teacher
    unturned = frames.student.mT @ teacher[:d_s]  # that of [I 0]
    core = polar(between[:k, :k], unturned[:k, :k])
    rest = polar(between[k:, k:], unturned[k:, k:])
    flipped = "none"
    if det == "positive" and d_s == d_r and _reflects(frames.student, core, rest, teacher):
        if core.flip_cost < rest.flip_cost:
            core, flipped = core.flipped(), "core"
        else:
            rest, flipped = rest.flipped(), "rest"
    turned = torch.block_diag(core.factor, rest.factor)
    return Turn(k, core, rest, frames.student @ turned @ teacher.mT, flipped)


def _reflects(student: Tensor, core: Polar, rest: Polar, teacher: Tensor) -> bool:
    # slogdet: of an orthogonal matrix the sign is certain, and nothing under- or overflows.
    signs = [
        torch.linalg.slogdet(part).sign for part in (student, core.factor, rest.factor, teacher)
    ]
    return bool(torch.stack(signs).prod() < 0)


def _handed_over(
    group: str, sites: tuple[str, ...], frames: Frames, turn: Turn, scores: _Scores | None
) -> Rotation | Unwhitened:
    k = turn.k
    student, teacher = frames.student[:, :k].contiguous(), frames.teacher[:, :k].contiguous()
    core, values = turn.core.factor, turn.core.values
    if scores is None:
        return Rotation(group, sites, student, core, teacher, turn.full, values)
    return Unwhitened(
        group=group,
        sites=sites,
        student_basis=student,
        core=core,
        teacher_basis=teacher,
        student_mean=scores.mean_x,
        student_scale=scores.scale_x,
        teacher_mean=scores.mean_y,
        teacher_scale=scores.scale_y,
        singular_values=values,
    )


def _energy(of: Pooled, frames: Frames, k: int, ridge: float) -> dict[str, Any]:
    """Share of either side's second moment in k directions; how many of them hold next to none."""
    found: dict[str, Any] = {}
    sides = (("student", of.xx, frames.student), ("teacher", of.yy, frames.teacher))
    for name, moment, frame in sides:
        kept = ((moment @ frame[:, :k]) * frame[:, :k]).sum(0)  # along each direction
        total = float(moment.trace())
        found[f"{name}_energy"] = float(kept.sum()) / total
        found[f"{name}_below_ridge"] = int((kept < ridge * total / len(moment)).sum())
    return found
