"""Moments of rows that are at hand, by their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from core.transport.moments import Moments


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """x [n, d_s], y [n, d_t], every row of weight 1."""
    x, y = x.double(), y.double()
    n = torch.tensor(float(len(x)), dtype=torch.float64)
    return Moments(n, x.sum(0), y.sum(0), x.mT @ x, y.mT @ y, x.mT @ y)


def orthogonal(d: int, *, seed: int) -> Tensor:
    """A random orthogonal matrix, [d, d] float64."""
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q, R = torch.linalg.qr(noise)
    return Q * R.diagonal().sign()


def rows(n: int, d: int, *, seed: int, falling: bool = True) -> Tensor:
    """Rows of uneven spread along turned axes, off the origin; [n, d] float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    spread = torch.linspace(2, 0.3, d, dtype=torch.float64) if falling else torch.ones(d)
    return (noise * spread) @ orthogonal(d, seed=seed + 1) + 0.4
