"""The principal logarithm of rotations, exact at the angle pi."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.rotations.skew import from_planes, split_planes

NEAR_PI = (-0.98, -0.88)
"""Between these cosines begins what is near pi, where theta / sin(theta) is too steep to use."""
NEAR_ORTHOGONAL = 1e-2
"""Frobenius distance of W^T W from 1, over sqrt(d), up to which W counts as orthogonal."""
ROUNDING = 4e-15
"""The same distance, up to which nothing is left to polish in float64."""


@dataclass(frozen=True)
class RotationLog:
    """Skew L with exp(L) = W, and how well that holds."""

    bivectors: Tensor
    """[C, d, d] skew, dtype and device of the input; all angles in [0, pi]."""
    residuals: Tensor
    """[C] float64: |exp(L) - W|_F / |1|_F, W as given and L before it is narrowed to its dtype."""
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
        residuals[index] = _residual(log, given)
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


def _residual(L: Tensor, W: Tensor) -> Tensor:
    """Return |exp(L) - W|_F / sqrt(d), as |H - W H^T|_F with H = exp(L / 2); ||L||_2 <= pi.

    Knows nothing of eigenvectors: Taylor to degree 12 at L / 8 (remainder 1e-15), two squarings.
    """
    powers = [torch.eye(len(L)).to(L), L / 8]
    powers += [powers[1] @ powers[1]]
    powers += [powers[1] @ powers[2], powers[2] @ powers[2]]
    total = powers[4] / math.factorial(12)
    for start in (8, 4, 0):
        for k in range(4):
            total = total.add(powers[k], alpha=1 / math.factorial(start + k))
        total = total @ powers[4] if start else total
    half = total @ total
    half = half @ half
    gap: Tensor = torch.linalg.norm(half - W @ half.mT)
    return gap / math.sqrt(len(L))


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
