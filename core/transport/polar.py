"""The orthogonal factor that a cross-moment asks for, and what it is where the moment says nothing.

Schönemann 1966; document 002, section 4.3: ``M = U S V^T``, ``R~ = U V^T``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Polar:
    """``factor`` maximises ``tr(F^T M)`` over all F [m, n] with ``F F^T = I``, m <= n. float64."""

    left: Tensor
    """[m, m], orthonormal columns."""
    right: Tensor
    """[n, m], orthonormal columns."""
    values: Tensor
    """[m], falling, >= 0: what each pair of columns adds to ``tr(F^T M)``."""

    @property
    def factor(self) -> Tensor:
        """[m, n]."""
        return self.left @ self.right.mT

    @property
    def flip_cost(self) -> float:
        """What ``flipped`` takes from ``tr(F^T M)``; infinite where there is nothing to flip."""
        return 2 * float(self.values[-1]) if len(self.values) else float("inf")

    def flipped(self) -> Polar:
        """Return the best factor whose determinant is the other one (Kabsch 1976).

        ``values`` keeps its size: of the pair that was turned round it is lost, not gained.
        """
        turned = torch.cat([self.left[:, :-1], -self.left[:, -1:]], dim=1)
        return replace(self, left=turned)


def polar(moment: Tensor, prior: Tensor) -> Polar:
    """Find the orthogonal factor of a cross-moment; where it is zero, that of the prior.

    Directions whose singular value is rounding (below ``eps * n`` of the largest) are free: any
    choice is as good. Among these the one with the largest ``tr(F^T prior)`` is taken, so that the
    factor depends on the moment and the prior alone, not on which vectors LAPACK returned.

    Args:
        moment: M, [m, n], m <= n.
        prior: [m, n].
    """
    m, n = moment.shape
    U, S, Vh = torch.linalg.svd(moment.double())
    largest = float(S[0]) if m else 0.0
    sure = int((torch.finfo(S.dtype).eps * n * largest < S).sum())
    if sure == m:
        return Polar(U, Vh[:m].mT, S)
    free_left, free_right = U[:, sure:], Vh[sure:].mT  # [m, m - sure], [n, n - sure]
    A, _, Bh = torch.linalg.svd(free_left.mT @ prior.double() @ free_right, full_matrices=False)
    left = torch.cat([U[:, :sure], free_left @ A], dim=1)
    right = torch.cat([Vh[:sure].mT, free_right @ Bh.mT], dim=1)
    return Polar(left, right, torch.cat([S[:sure], torch.zeros_like(S[sure:])]))


def steady_signs(columns: Tensor) -> Tensor:
    """Turn every column so that its largest entry (the first of equals) is positive."""
    if not columns.numel():
        return columns
    at = columns.abs().argmax(0, keepdim=True)
    signs = columns.gather(0, at).sign()
    return columns * torch.where(signs == 0, torch.ones_like(signs), signs)


def identity(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return ones on the diagonal of a [rows, columns] float64 zero matrix, where ``like`` is."""
    return torch.eye(rows, columns, dtype=torch.float64, device=like.device)


def deviation(square: Tensor) -> float:
    """Return max abs (square - I); 0 of an empty one."""
    if not square.numel():
        return 0.0
    return float((square - identity(square.shape[0], square.shape[1], square)).abs().max())
