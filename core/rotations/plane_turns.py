"""Rotations inside the planes of a codebook: disjoint, one after another, or blended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.rotations.chebyshev import RADIUS_STEP, series
from core.rotations.planes import rotate_in_planes

BLEND_TOLERANCE = 1e-7
"""Of the series of a blend, relative to the length of a query: what float32 holds."""


def bases_of(planes: Tensor) -> Tensor:
    """Return [d, 2m] columns a_0, b_0, a_1, b_1, ... from [m, 2, d]."""
    return planes.flatten(0, 1).T


def rotate(queries: Tensor, planes: Tensor, angles: Tensor) -> Tensor:
    """Rotate inside disjoint planes: q exp(sum_i theta_i (a_i b_i^T - b_i a_i^T)), exactly.

    Rodrigues in each plane; lengths stay to rounding; differentiable in every argument. In planes
    that overlap this is no rotation: see the two functions below.

    Args:
        queries: [B, d].
        planes: [m, 2, d], disjoint, same dtype and device.
        angles: [m] or [B, m], radians.

    Returns:
        [B, d].
    """
    return rotate_in_planes(queries, bases_of(planes), angles)


def rotate_in_order(queries: Tensor, planes: Tensor, angles: Tensor) -> Tensor:
    """Rotate in one plane after the other, first to last: q R_1(theta_1) ... R_m(theta_m).

    Exact in planes that overlap too, where the order matters; arguments as for ``rotate``.
    """
    for plane, angle in zip(planes, angles.expand(len(queries), -1).unbind(1), strict=True):
        queries = rotate_in_planes(queries, plane.T, angle[:, None])
    return queries


def rotate_by_blend(
    queries: Tensor,
    planes: Tensor,
    angles: Tensor,
    *,
    radius: float | None = None,
    tolerance: float = BLEND_TOLERANCE,
) -> Tensor:
    """Rotate by q exp(sum_i theta_i (a_i b_i^T - b_i a_i^T)) for planes that may overlap.

    The Chebyshev action of ``exp_action``, with B applied through its planes (4 d m multiplications
    a step) and differentiable in every argument.

    Args:
        queries: [B, d].
        planes: [m, 2, d].
        angles: [B, m], radians.
        radius: a bound of sum_i |theta_i| for every row; where absent it is taken from the angles.
        tolerance: of the series, relative to the length of the query.
    """
    if radius is None:
        radius = float(angles.detach().abs().sum(1).max()) if angles.numel() else 0.0
    coefficients, reach = blend_series(radius, tolerance)
    bases = bases_of(planes)
    result, before = coefficients[0] * queries, queries
    if len(coefficients) == 1:
        return result
    now = _turned(queries, bases, angles) / reach
    for coefficient in coefficients[1:-1]:
        result = result + coefficient * now
        now, before = (2 / reach) * _turned(now, bases, angles) + before, now
    return result + coefficients[-1] * now


def blend_series(radius: float, tolerance: float = BLEND_TOLERANCE) -> tuple[list[float], float]:
    """Return coefficients of phi_0 ... phi_K and the radius they are for, at least ``radius``."""
    step = math.ceil(radius / RADIUS_STEP)
    return list(series(step, tolerance)), step * RADIUS_STEP


def _turned(rows: Tensor, bases: Tensor, angles: Tensor) -> Tensor:
    """Rows @ sum_i theta_i (a_i b_i^T - b_i a_i^T)."""
    coordinates = rows @ bases
    along, across = coordinates[:, 0::2], coordinates[:, 1::2]
    moved = torch.stack([-across * angles, along * angles], dim=-1)
    return moved.flatten(-2) @ bases.mT
