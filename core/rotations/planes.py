"""A bivector as rotations in disjoint planes, and the differentiable rotation in given planes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from torch import Tensor

from core.rotations.skew import split_planes

SAME = 1e-3
"""Relative gap of squared angles below which planes are separated together, by a Schur form."""

VANISHING = 1e-140
"""Angle below which its square leaves float64, or loses digits there; it is taken for zero."""
FEW = 0.25
"""Share of a matrix's eigenvectors up to which LAPACK finds them alone sooner than all of them."""


@dataclass(frozen=True)
class PlaneFactors:
    """L_c = sum_i theta_i (a_i b_i^T - b_i a_i^T): q exp(L) turns a towards b."""

    bases: Tensor
    """[C, d, 2m] orthonormal columns; 2i and 2i + 1 are a_i and b_i."""
    angles: Tensor
    """[C, m] radians, >= 0 (at most pi for a principal logarithm), descending."""


def plane_factors(bivectors: Tensor, *, planes: int | None = None) -> PlaneFactors:
    """Split skew matrices into planes, the largest angles first; repeated angles pair exactly.

    Through the symmetric eigenproblem of L^T L; directions whose angles nearly agree are split
    by a real Schur form of L among them.

    Args:
        bivectors: [C, d, d] skew, float32 or float64; widened to float64 inside.
        planes: m, at most d // 2; all of them where absent.

    Returns:
        Factors in the dtype of ``bivectors``.
    """
    C, d, _ = bivectors.shape
    m = d // 2 if planes is None else planes
    if not 0 <= m <= d // 2:
        raise ValueError(f"{planes} planes in width {d}; at most {d // 2}")
    bases, angles = bivectors.new_empty(C, d, 2 * m), bivectors.new_empty(C, m)
    for index, bivector in enumerate(bivectors.detach()):
        basis, sizes = _factor(bivector.double())
        bases[index], angles[index] = basis[:, : 2 * m], sizes[:m]
    return PlaneFactors(bases, angles)


def leading_planes(bivectors: Tensor, planes: int) -> PlaneFactors:
    """Split off the planes of largest angle, looking only where they lie.

    Most angles of a rotation fitted to few pairs are zero, and telling those planes apart is most
    of the work of ``plane_factors``. Planes whose angles agree with the first one left out may be
    mixed with it: no selection among equals is better.

    Args:
        bivectors: [C, d, d] skew.
        planes: m, at most d // 2.
    """
    # scipy's threads go on spinning after each of its calls, in torch's way: hers first.
    spans = [_leading_span(bivector, 2 * planes) for bivector in bivectors]
    bases, angles = [], []
    for bivector, span in zip(bivectors, spans, strict=True):
        inside = span.T @ bivector.double() @ span
        found = plane_factors(((inside - inside.T) / 2)[None])
        bases.append(span @ found.bases[0])
        angles.append(found.angles[0])
    dtype = bivectors.dtype
    return PlaneFactors(torch.stack(bases).to(dtype), torch.stack(angles).to(dtype))


def _leading_span(bivector: Tensor, count: int) -> Tensor:
    """[d, d] skew -> [d, count] float64: the leading eigenvectors of L^T L."""
    d = len(bivector)
    if not count:
        return bivector.new_zeros(d, 0, dtype=torch.float64)
    lower = dsyrk(1.0, bivector.detach().double().cpu().numpy(), trans=1, lower=1)
    if count > FEW * d:
        vectors = eigh(lower, driver="evd")[1][:, d - count :]
    else:
        vectors = eigh(lower, subset_by_index=(d - count, d - 1))[1]
    return torch.from_numpy(vectors).to(bivector.device)


def rotate_in_planes(queries: Tensor, bases: Tensor, angles: Tensor) -> Tensor:
    """Rotate by the angles inside disjoint planes: q exp(L) for the L of these factors.

    Rodrigues in each plane; lengths stay to rounding; differentiable in every argument.

    Args:
        queries: [B, d].
        bases: [d, 2m], orthonormal columns.
        angles: [m] or [B, m], radians.

    Returns:
        [B, d].
    """
    coordinates = queries @ bases  # [B, 2m]
    along, across = coordinates[:, 0::2], coordinates[:, 1::2]
    versine, sine = -2 * (angles / 2).sin().square(), angles.sin()  # cos - 1 without cancellation
    change = torch.stack([along * versine - across * sine, along * sine + across * versine], dim=-1)
    return queries + change.flatten(-2) @ bases.mT


def _factor(L: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor]:
    """All planes of one [k, k] float64: [k, 2 (k // 2)] columns and [k // 2] angles, descending.

    Squaring loses angles far below the largest; they come out as one group, which is split again
    at its own scale. What is below ``floor`` is rounding: any orthonormal directions do.
    """
    k = len(L)
    if floor is None:
        floor = float(torch.linalg.matrix_norm(L)) * k * torch.finfo(L.dtype).eps
        floor = max(floor, VANISHING)
    squares, vectors = torch.linalg.eigh(L.mT @ L)
    squares, vectors = squares.flip(0), vectors.flip(1)  # descending
    if float(squares[:1].clamp(min=0).sum()) <= floor**2:
        return vectors[:, : k // 2 * 2], L.new_zeros(k // 2)
    starts = squares.diff() < -SAME * squares[:1]
    bounds = [0, *(starts.nonzero().flatten() + 1).tolist(), k]
    bases, angles = [], []
    for start, stop in itertools.pairwise(bounds):
        group = vectors[:, start:stop]
        inside = group.mT @ L @ group
        inside = (inside - inside.mT) / 2  # Rounding must not part what is a pair.
        far_below = start > 0 and stop == k
        mix, sizes = _factor(inside, floor) if far_below else split_planes(inside)
        bases.append((group @ mix)[:, : 2 * len(sizes)])
        angles.append(sizes)
    return _descending(torch.cat(bases, 1), torch.cat(angles))


def _descending(basis: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Sort planes by angle."""
    angles, order = angles.sort(descending=True, stable=True)
    columns = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    return basis[:, columns], angles
