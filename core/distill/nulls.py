"""What a student must beat to have learnt anything: one vector for all, and a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import DataInvalid

STRENGTHS = tuple(10.0**power for power in range(-6, 4))
"""Ridge strengths tried, in units of the mean eigenvalue of the queries' covariance."""
INNER = 0.2
"""Share of the training rows on which the strength is chosen."""


@dataclass(frozen=True)
class Ridge:
    """An affine map fitted in closed form: ``q -> q W + b``."""

    weight: Tensor
    """[d, m] float64."""
    bias: Tensor
    """[m] float64."""
    strength: float
    """Chosen among ``STRENGTHS``."""

    def __call__(self, queries: Tensor) -> Tensor:
        """Map [B, d] of any float dtype to [B, m] float64."""
        return queries.double() @ self.weight + self.bias


def mean_vector(targets: Tensor) -> Tensor:
    """Return the mean of [n, m] targets, [m] float64: what one says without looking at a query."""
    return targets.double().mean(0)


def fit_ridge(queries: Tensor, targets: Tensor, *, seed: int = 0) -> Ridge:
    """Fit ``(X^T X + lam I)^-1 X^T Y`` on centred rows, in float64.

    ``lam`` is n times a strength times the mean eigenvalue of the covariance; the strength of the
    smallest squared error on INNER of the rows wins, and the map is then fitted on all of them.
    (Hoerl and Kennard 1970.) A single row, or rows that are all equal, give the mean vector.

    Args:
        queries: [n, d], n >= 1.
        targets: [n, m].
        seed: of the inner split.

    Raises:
        DataInvalid: no rows, not as many of both, or values that are not finite.
    """
    if queries.ndim != 2 or targets.ndim != 2 or not 1 <= len(queries) == len(targets):
        raise DataInvalid(
            f"ridge: queries {list(queries.shape)}, targets {list(targets.shape)}; needed are "
            "[n, d] and [n, m] with n >= 1"
        )
    x, y = queries.detach().double(), targets.detach().double()
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise DataInvalid("ridge: queries or targets are not finite")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held = round(INNER * len(x))
    if held == 0:
        return _ridges(x, y, STRENGTHS[-1:])[0]
    kept, out = order[held:], order[:held]
    tried = _ridges(x[kept], y[kept], STRENGTHS)
    errors = [float((ridge(x[out]) - y[out]).square().sum()) for ridge in tried]
    return _ridges(x, y, (STRENGTHS[errors.index(min(errors))],))[0]


def _ridges(x: Tensor, y: Tensor, strengths: tuple[float, ...]) -> list[Ridge]:
    """One map per strength from one decomposition."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    values = values.clamp(min=0)
    turned = vectors.T @ (centred.T @ (y - y_mean)) / len(x)  # [d, m]
    size = values.mean().clamp(min=torch.finfo(x.dtype).tiny)
    found = []
    for strength in strengths:
        weight = vectors @ (turned / (values + strength * size)[:, None])
        found.append(Ridge(weight, y_mean - x_mean @ weight, strength))
    return found
