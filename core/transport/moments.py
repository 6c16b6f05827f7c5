"""Moments of aligned rows of two residual streams: additive, so any split of the rows gives them.

One pair of sites holds ``8 (1 + d_s + d_t + d_s^2 + d_t^2 + d_s d_t)`` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over aligned tokens: x the student's row, y the teacher's, w the token's weight.

    All float64; ``sum w``, ``sum w x`` [d_s], ``sum w y`` [d_t], ``sum w x^T x`` [d_s, d_s],
    ``sum w y^T y`` [d_t, d_t], ``sum w x^T y`` [d_s, d_t].
    """

    n: Tensor
    """[] float64."""
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows."""
        return Moments(
            self.n + other.n,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
        )
