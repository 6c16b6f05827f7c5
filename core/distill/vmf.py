"""The von Mises-Fisher density on the unit sphere, in float64 at any width and concentration."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ive

from core.tensors.shards import Array

FLOOR = float(np.finfo(np.float32).eps) ** 2
"""Least mean squared chord that is told apart from none: vectors are rounded to float32."""
LARGE = 30.0
"""From here on, of sqrt(nu^2 + x^2), the asymptotic series is exact to 2e-8 and scipy is not used,
whose own function underflows at large orders."""
CLOSE = 1e-6
"""Below it, of 1 - mean cosine, the closed form is as good as rounding lets Newton's method be."""
ROUNDS = 3
LEAST = 1e-6
"""Least concentration: the uniform density, to rounding."""


def log_density(squared_chords: Array, concentration: float, dim: int) -> Array:
    """Log of C_d(k) exp(k mu.y), in nats per row; the surface measure is not normalised to 1.

    ``mu.y = 1 - s / 2`` for a squared chord s = |y - mu|^2, which keeps its digits where both
    nearly agree. C_d(k) = k^(d/2-1) / ((2 pi)^(d/2) I_{d/2-1}(k)) (Mardia & Jupp 2000,
    Directional Statistics, section 9.3.2).

    Args:
        squared_chords: [n] in [0, 4].
        concentration: k > 0.
        dim: d >= 2.
    """
    k, order = concentration, dim / 2 - 1
    constant = order * math.log(k) - dim / 2 * math.log(2 * math.pi) - log_bessel(order, k)
    return constant - k / 2 * squared_chords.astype(np.float64)


def concentration(mean_squared_chord: float, dim: int) -> float:
    """Maximum-likelihood concentration around known directions: A_d(k) = mean cosine.

    A_d(k) = I_{d/2}(k) / I_{d/2-1}(k). Starts from Banerjee et al. 2005 (JMLR 6, eq. 4.4), then
    Newton steps as Sra 2012 (Computational Statistics 27, section 2). Tends to (d - 1) / s for a
    small mean squared chord s.

    Args:
        mean_squared_chord: s, of answers to targets; below FLOOR it counts as FLOOR. At 2 and
            more (no better than chance) the density is the uniform one.
        dim: d >= 2.
    """
    apart = max(mean_squared_chord, FLOOR) / 2  # 1 - mean cosine
    cosine = 1 - apart
    if cosine <= 0:
        return LEAST
    k = max(LEAST, cosine * (dim - cosine**2) / (apart * (1 + cosine)))
    for _ in range(ROUNDS if apart > CLOSE else 0):
        ratio = math.exp(log_bessel(dim / 2, k) - log_bessel(dim / 2 - 1, k))
        slope = 1 - ratio**2 - (dim - 1) / k * ratio
        k = max(LEAST, k - (ratio - cosine) / slope)
    return k


def log_bessel(order: float, x: float) -> float:
    """Log of exp(-x) I_order(x), the scaled modified Bessel function of the first kind.

    Debye's uniform expansion (DLMF 10.41.3) to its fourth term, written in 1 / s with
    s = sqrt(order^2 + x^2), which needs no order above 0.

    Args:
        order: >= 0.
        x: > 0.
    """
    s = math.hypot(order, x)
    if s < LARGE:
        value = float(ive(order, x))
        # The first term of the power series, where scipy's result underflows.
        return math.log(value) if value > 0 else order * math.log(x / 2) - math.lgamma(order + 1)
    p = order / s
    u = (
        (3 - 5 * p**2) / 24,
        (81 - 462 * p**2 + 385 * p**4) / 1152,
        (30375 - 369603 * p**2 + 765765 * p**4 - 425425 * p**6) / 414720,
        (4465125 - 94121676 * p**2 + 349922430 * p**4 - 446185740 * p**6 + 185910725 * p**8)
        / 39813120,
    )
    series = 1 + sum(term / s ** (n + 1) for n, term in enumerate(u))
    return (
        order**2 / (s + x)
        + order * math.log(x / (order + s))
        - 0.5 * math.log(2 * math.pi * s)
        + math.log(series)
    )
