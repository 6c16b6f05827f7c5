"""The planes a student keeps of each cluster's rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from core.rotations.planes import PlaneFactors, plane_factors


def leading_planes(bivectors: Tensor, planes: int) -> PlaneFactors:
    """Split off the planes of largest angle, looking only where they lie.

    Most angles of a rotation fitted to few pairs are zero, and telling those planes apart is most
    of the work of ``plane_factors``. Planes whose angles agree with the first one left out may be
    mixed with it: no selection among equals is better.

    Args:
        bivectors: [C, d, d] skew.
        planes: m, at most d // 2.
    """
    bases, angles = [], []
    for bivector in bivectors.double():
        span = torch.linalg.eigh(bivector.T @ bivector).eigenvectors[:, -2 * planes :]  # [d, 2m]
        inside = span.T @ bivector @ span
        found = plane_factors(((inside - inside.T) / 2)[None])
        bases.append(span @ found.bases[0])
        angles.append(found.angles[0])
    dtype = bivectors.dtype
    return PlaneFactors(torch.stack(bases).to(dtype), torch.stack(angles).to(dtype))
