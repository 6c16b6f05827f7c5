"""The rotation that carries queries onto targets best: uncentred, anchored, determinant +1."""

from __future__ import annotations

import torch
from torch import Tensor


def procrustes(
    queries: Tensor, targets: Tensor, *, anchor: Tensor | None = None, strength: float = 0.0
) -> Tensor:
    """Maximise tr R^T (X^T Y + strength * G) over rotations R; then X R is nearest to Y.

    Args:
        queries: X, [n, d], any float dtype.
        targets: Y, [n, d].
        anchor: G, [d, d]; the identity where absent.
        strength: >= 0, in units of the moment: 0 ignores the anchor.

    Returns:
        [d, d], dtype of ``queries``.
    """
    if strength < 0:
        raise ValueError(f"strength {strength} must be >= 0")
    moment = queries.double().mT @ targets.double()
    if strength:
        d = moment.shape[0]
        pull = torch.eye(d, dtype=moment.dtype, device=moment.device)
        moment += strength * (pull if anchor is None else anchor.to(moment))
    return procrustes_from_moment(moment).to(queries.dtype)


def procrustes_from_moment(moment: Tensor) -> Tensor:
    """Maximise tr R^T M over rotations: R = U diag(1, .., 1, +-1) V^T (Kabsch 1976).

    The last sign makes the determinant +1 where it costs least: at the smallest singular value.

    Args:
        moment: [.., d, d], M = X^T Y; widened to float64 inside.

    Returns:
        [.., d, d], dtype of ``moment``.
    """
    U, _, Vh = torch.linalg.svd(moment.double())
    signs = torch.ones_like(U[..., 0, :])
    # slogdet: of an orthogonal product the sign is certain, and nothing under- or overflows.
    signs[..., -1] = torch.linalg.slogdet(U @ Vh).sign
    rotation: Tensor = (U * signs[..., None, :]) @ Vh
    return rotation.to(moment.dtype)


def centred_procrustes(queries: Tensor, targets: Tensor) -> Tensor:
    """Fit as document 000 does: centred, unanchored, the last column flipped where det < 0.

    Worse than `procrustes`: arbitrary on what the pairs do not span, and the flip depends on the
    axes.

    Args:
        queries: X, [n, d], any float dtype.
        targets: Y, [n, d].

    Returns:
        [d, d] float64.
    """
    x, y = queries.double(), targets.double()
    u, _, vt = torch.linalg.svd((x - x.mean(0)).T @ (y - y.mean(0)))
    rotation: Tensor = u @ vt
    if torch.linalg.slogdet(rotation).sign < 0:
        rotation[:, -1] *= -1
    return rotation
