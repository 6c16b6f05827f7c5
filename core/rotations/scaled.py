"""Splits a matrix W = s R into a scale and a rotation. Torch-free: imports and the API use it."""

from dataclasses import dataclass

import numpy as np

from core.errors import DataInvalid
from core.tensors.shards import Array

TOLERANCE = 1e-3
"""How far the singular values may be from their mean, relative, for W to be a scaled rotation."""
SNAP = 1e-5
"""A scale this near one is rounding and becomes exactly one."""


@dataclass(frozen=True)
class ScaledRotation:
    """``W = scale * rotation``, after mending a reflection."""

    rotation: Array
    """[d, d] float64, orthogonal to rounding, determinant +1."""
    scale: float
    deviation: float
    """An upper bound of max |sigma / scale - 1| of the matrix as it came."""
    reflected: bool


def split(matrix: Array, *, cluster: str) -> ScaledRotation:
    """Split ``matrix`` [d, d]; in float64 whatever its dtype.

    Raises:
        DataInvalid: it is no scaled rotation; names the cluster.
    """
    finite = np.isfinite(matrix).all()  # asked first: widening a signalling NaN warns
    wide = matrix.astype(np.float64) if finite else np.full(matrix.shape, np.nan)
    largest = float(np.abs(wide).max())
    if not 1e-15 < largest < 1e15:
        raise DataInvalid(
            f"cluster {cluster}: W_stack holds NaN, infinity, only zeros or entries out of range "
            f"(largest {largest:.3g}); fit the cluster again"
        )
    gram = wide.T @ wide
    scale = float(np.sqrt(np.trace(gram) / len(gram)))  # root mean square = mean, within tol**2
    deviation = _deviation(gram / scale**2)
    if deviation > TOLERANCE:
        raise DataInvalid(
            f"cluster {cluster}: W is not a scaled rotation: its singular values are up to "
            f"{deviation:.3g} from their mean {scale:.4g}, relative, and {TOLERANCE:g} is allowed; "
            "fit it with orthogonal Procrustes, or replace W by U @ Vt of its SVD"
        )
    rotation, reflected = _proper(wide / scale)
    if abs(scale - 1) <= SNAP:
        scale = 1.0
    return ScaledRotation(_polish(rotation), scale, deviation, reflected)


def _deviation(gram: Array) -> float:
    """Bound max |sigma - 1|, given R^T R: by the Frobenius norm, exactly where that is too big."""
    off = gram - np.eye(len(gram))
    bound = float(np.linalg.norm(off))
    if bound <= TOLERANCE:
        return bound
    values = np.linalg.eigvalsh(gram).clip(min=0)
    return float(np.abs(np.sqrt(values) - 1).max())


def _proper(rotation: Array) -> tuple[Array, bool]:
    """Turn a determinant of -1 into +1 by reflecting an eigenvector of -1: R - 2 R v v^T.

    Every other direction keeps its image; flipping a column would depend on the axes. Written so
    that the result is orthogonal even where v mixes with eigenvectors near -1.
    """
    # Not det: it underflows for large d, the sign does not.
    if np.linalg.slogdet(rotation)[0] > 0:
        return rotation, False
    _, vectors = np.linalg.eigh((rotation + rotation.T) / 2)
    lowest = vectors[:, 0]
    return rotation - 2 * np.outer(rotation @ lowest, lowest), True


def _polish(rotation: Array) -> Array:
    """Two Newton-Schulz steps: from 1e-3 off orthogonal to 1e-12."""
    for _ in range(2):
        rotation = 1.5 * rotation - 0.5 * rotation @ (rotation.T @ rotation)
    return rotation
