"""The principal logarithm of rotations, exact at the angle pi."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.rotations.chebyshev import RADIUS_STEP, series
from core.rotations.skew import from_planes, split_planes

NEAR_PI = (-0.98, -0.88)
"""Between these cosines begins what is near pi, where theta / sin(theta) is too steep to use."""
NEAR_ORTHOGONAL = 1e-2
"""Frobenius distance of W^T W from 1, over sqrt(d), up to which W counts as orthogonal."""
PROBES = 32
"""Random rows by which a residual is estimated."""
ROUNDING = 4e-15
"""The same distance, up to which nothing is left to polish in float64."""


@dataclass(frozen=True)
class RotationLog:
    """Skew L with exp(L) = W, and how well that holds."""

    bivectors: Tensor
    """[C, d, d] skew, dtype and device of the input; all angles in [0, pi]."""
    residuals: Tensor
    """[C] float64: |exp(L) - W|_F / |1|_F, estimated by random rows (to about 20 %), W as given and
    L before it is narrowed to its dtype."""
    norms: Tensor
    """[C] float64, radians: the largest angle, ||L||_2, or little above it; for ``exp_action``."""


def rotation_log(rotations: Tensor) -> RotationLog:
    """Find the skew L with exp(L) = W and angles up to pi.

    With S and A the symmetric and skew parts of W, log W = A (theta / sin theta)(S) wherever S
    stays away from -1: no pairing of eigenvectors is needed. The few directions near -1 go
    through a real Schur form of A, which pairs exact -1's with each other.

    Args:
        rotations: [C, d, d] or [d, d], determinant +1, float32 or float64; rounding away from
            orthogonal is removed first. Anything further off is refused: split it before.

    Returns:
        Logarithms for C matrices (1 for a single one), computed in float64.
    """
    stack = rotations if rotations.ndim == 3 else rotations[None]
    bivectors = torch.empty_like(stack)
    residuals = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    norms = torch.zeros_like(residuals)
    for index, rotation in enumerate(stack.detach()):
        given = rotation.double()
        log, norms[index] = _log(_orthonormal(given))
        residuals[index] = _residual(log, given, radius=float(norms[index]))
        bivectors[index] = log
    return RotationLog(bivectors, residuals, norms)


def _log(W: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm and largest angle of one rotation: [d, d] float64, orthogonal to rounding."""
    skew = (W - W.mT) / 2
    cosines, vectors = torch.linalg.eigh((W + W.mT) / 2)  # ascending: angles near pi come first
    cut = _widest_gap(cosines)
    near, far = vectors[:, :cut], vectors[:, cut:]
    if cut % 2:
        raise ValueError(
            "the determinant is -1: a reflection has no real logarithm; "
            "scaled.split turns it into a rotation"
        )
    angles = cosines[cut:].clamp(-1, 1).acos()  # its error of 1e-8 at 0 is harmless: sinc is flat
    log = (far / torch.sinc(angles / math.pi)) @ (far.mT @ skew)
    if cut:
        mix, sines = split_planes(near.mT @ skew @ near)
        across = (mix.square() * cosines[:cut, None]).sum(0)  # [cut]: cosines of the new basis
        angles = torch.atan2(sines, (across[0::2] + across[1::2]) / 2)
        log = log + from_planes(near @ mix, angles)
    log = (log - log.mT) / 2
    largest = angles.amax()
    if largest < 1e-2:  # where acos loses digits
        largest = torch.linalg.norm(log) / math.sqrt(2)  # >= ||L||_2: angles stand there twice
    return log, largest * (1 + 1e-9)


def log_residuals(bivectors: Tensor, rotations: Tensor, norms: Tensor, *, seed: int) -> Tensor:
    """Estimate how far exp(L_c) is from W_c polished, for logarithms that somebody else computed.

    By the same random rows as ``rotation_log``, drawn from ``seed``. Who could choose L after the
    rows would choose an error they do not see: draw the seed from L itself.

    Args:
        bivectors: [C, d, d] skew, float32 or float64.
        rotations: [C, d, d], W, float32 or float64; rounding away from orthogonal is removed first.
        norms: [C] float64, upper bounds of ||L_c||_2, little above it.
        seed: of the random rows, at least 0, below 2**63.

    Returns:
        [C] float64: |exp(L_c) - W_c|_F / sqrt(d), to about 20 %.
    """
    found = [
        _residual(L.double(), _orthonormal(W.double()), radius=float(norm), seed=seed)
        for L, W, norm in zip(bivectors, rotations, norms, strict=True)
    ]
    return torch.stack(found)


def _residual(L: Tensor, W: Tensor, *, radius: float, seed: int = 0) -> Tensor:
    """Estimate |exp(L) - W|_F / sqrt(d) by PROBES random rows: E|x M|^2 = |M|_F^2 for normal x.

    Knows nothing of eigenvectors: the Chebyshev action of L itself, which explodes where
    ||L||_2 > radius. Whatever the error looks like, the estimate has a standard deviation of at
    most 1 / sqrt(PROBES / 2) of its square; exp(L) in full would cost more than the logarithm.
    """
    d = len(L)
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(PROBES, d, generator=draws, dtype=torch.float64).to(L.device)
    step = max(1, math.ceil(radius / RADIUS_STEP))
    scale = 1 / (step * RADIUS_STEP)
    first, *others = series(step, 1e-15)
    before, phi, total = torch.zeros_like(rows), rows, first * rows
    for k, coefficient in enumerate(others):
        before, phi = phi, (phi @ L) * (scale if k == 0 else 2 * scale) + before
        total = total.add(phi, alpha=coefficient)
    gap: Tensor = torch.linalg.norm(total - rows @ W)
    return gap / math.sqrt(PROBES * d)


def _widest_gap(cosines: Tensor) -> int:
    """How many ascending cosines count as near pi, cut at the widest gap so planes stay whole."""
    low, high = ((cosines < bound).sum() for bound in NEAR_PI)
    window = cosines.new_tensor(NEAR_PI)
    gaps = torch.cat([window[:1], cosines[low:high], window[1:]]).diff()
    return int(low + gaps.argmax())


def _excess(W: Tensor) -> tuple[Tensor, float]:
    """Return W^T W - 1 and its Frobenius norm over sqrt(d): 0 if and only if W is orthogonal."""
    excess = W.mT @ W
    excess.diagonal().sub_(1)
    return excess, float(torch.linalg.norm(excess)) / math.sqrt(len(W))


def _orthonormal(W: Tensor) -> Tensor:
    """Polish W ([d, d] float64) to the nearest orthogonal matrix by Newton-Schulz steps."""
    for _ in range(6):  # quadratic: 1e-2, 1e-4, 1e-8, 1e-16
        excess, distance = _excess(W)
        if not distance <= NEAR_ORTHOGONAL:
            raise ValueError(f"not orthogonal: |W^T W - 1| = {distance:.1e} sqrt(d), at most 1e-2")
        if distance <= ROUNDING:
            break
        W = W - W @ excess / 2
    return W
