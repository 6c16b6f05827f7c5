"""Chooses a codebook's planes among those of principal components, and measures on planes."""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.rotations.planes import leading_planes, plane_factors
from core.rotations.principal import Components

SPARE = 4
"""Candidates kept per plane asked for: those that overlap larger ones are passed over."""
LEFT_OVER = (0.5, 0.05)
"""Least share of a candidate's vectors that must stand out of the planes before it: first those
that nearly are planes of their own, then whatever is left."""


def leading_of(found: Components, count: int, *, disjoint: bool) -> Tensor:
    """[count, 2, d] float64: the largest planes of the components."""
    d = found.values.shape[1]
    keep = (SPARE if disjoint else 1) * count
    planes, sizes = found.values.new_zeros(0, 2, d, dtype=torch.float64), torch.zeros(0).double()
    for value, variance in zip(found.values, found.variances.cpu(), strict=True):
        factors = leading_planes(value[None].double().cpu(), min(count, d // 2))
        own = factors.bases[0].T.unflatten(0, (-1, 2))
        planes = torch.cat([planes.cpu(), own])
        sizes = torch.cat([sizes, 2 * variance * factors.angles[0].square()])
        order = sizes.argsort(descending=True, stable=True)[:keep]
        planes, sizes = planes[order], sizes[order]
    solid = sizes > sizes[0] * torch.finfo(found.values.dtype).eps ** 2 * d
    planes = planes[solid]
    if disjoint:
        return _made_disjoint(planes, count, found.values[0].double().cpu())
    if len(planes) < count:
        raise DataInvalid(
            f"codebook.n_components {count}: the bivectors have {len(planes)} planes of any size; "
            f"ask for at most {len(planes)}, or for disjoint ones"
        )
    return planes


def _made_disjoint(candidates: Tensor, count: int, leading: Tensor) -> Tensor:
    """Take candidates in order, each less what lies in those before; fill up if they run out."""
    d = candidates.shape[2]
    chosen, taken = candidates.new_zeros(2 * count, d), 0
    waiting = list(candidates)
    for least in LEFT_OVER:
        passed = []
        for pair in waiting:
            before = chosen[: 2 * taken]
            rest = pair - pair @ before.T @ before
            rest = rest - rest @ before.T @ before  # once more: takes away what rounding left
            if taken < count and float(torch.linalg.svdvals(rest)[1]) >= least:
                left, _, right = torch.linalg.svd(rest, full_matrices=False)
                chosen[2 * taken : 2 * taken + 2] = left @ right  # the nearest orthonormal pair
                taken += 1
            else:
                passed.append(pair)
        waiting = passed
    if taken < count:
        chosen[2 * taken :] = _filling(chosen[: 2 * taken], count - taken, leading)
    return chosen.view(count, 2, d)


def _filling(chosen: Tensor, count: int, leading: Tensor) -> Tensor:
    """[2 count, d]: planes of the leading component inside what is orthogonal to ``chosen``."""
    outside = torch.linalg.qr(chosen.T, mode="complete").Q[:, len(chosen) :]
    inside = outside.T @ leading @ outside
    factors = plane_factors(((inside - inside.T) / 2)[None], planes=count)
    filling: Tensor = (outside @ factors.bases[0]).T
    return filling


def projections(bivectors: Tensor, planes: Tensor) -> Tensor:
    """a_i^T L_c b_i: [C, m] float64."""
    first, second = planes.double().unbind(1)  # [m, d] each
    sides = [((first @ bivector.double()) * second).sum(1) for bivector in bivectors]
    return torch.stack(sides) if sides else first.new_zeros(0, len(first))


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """<P_i, P_j> between two sets of planes: [m, M]."""
    (a, b), (c, d) = left.unbind(1), right.unbind(1)
    return 2 * ((a @ c.T) * (b @ d.T) - (a @ d.T) * (b @ c.T))


def half_gram_inverse(planes: Tensor) -> Tensor:
    """(Gram / 2)^+ of planes: [m, m] float64; the identity where they are disjoint."""
    inverse: Tensor = torch.linalg.pinv(
        inner_products(planes, planes) / 2, rtol=1e-9, hermitian=True
    )
    return inverse
