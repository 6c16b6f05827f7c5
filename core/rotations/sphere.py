"""Lengths, angles and steps of vectors on a sphere, with their gradients by hand.

Autograd over the small steps of a norm makes some ten passes over [B, d] each; on a CPU that is
as much time as the products of a student. Every function is differentiable once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 1e-12
"""Squared length of a step below which it is taken for this: sin(t) / t is 1 there to float32."""
SHORTEST = 1e-18
"""Length below which a vector has no direction: the angle from any other to it is a right one."""
OPPOSITE = 1e-6
"""sin(t) / t below which the direction from one vector to its opposite is rounding."""


def unit(vectors: Tensor) -> Tensor:
    """Scale rows to length 1; zero rows stay zero."""
    return keep_length(vectors, vectors.new_ones(1, 1))


def keep_length(vectors: Tensor, like: Tensor) -> Tensor:
    """Scale rows to the lengths of ``like``: takes away what rounding added over many factors.

    Entries from 1e-15 to 1e15, all that stored embeddings have: squares of others leave float32.

    Args:
        vectors: [B, d]; zero rows stay zero.
        like: [B, any], or [1, any] for all rows alike.

    Returns:
        [B, d] in the wider of both dtypes, at least float32.
    """
    kept: Tensor = _KeepLength.apply(vectors, like)  # type: ignore[no-untyped-call]
    return kept


def squared_angles(x: Tensor, y: Tensor) -> Tensor:
    """Squared angle between rows: [B, d] twice, of one dtype, to [B], rad^2; zero where parallel.

    2 atan2(|x - y|, |x + y|) of unit vectors (Kahan 2006, section 12) is exact at both ends. acos
    of a clamped cosine loses half the digits near 0 and has no gradient where it is clamped.
    """
    found: Tensor = _SquaredAngles.apply(x, y)  # type: ignore[no-untyped-call]
    return found


def typical_length(vectors: Tensor) -> Tensor:
    """Root mean square of the lengths of [n, d] rows: a float64 scalar."""
    whole = torch.linalg.vector_norm(vectors, dtype=torch.float64)
    typical: Tensor = whole / max(1, len(vectors)) ** 0.5
    return typical


def step_along(units: Tensor, steps: Tensor) -> Tensor:
    """Walk from each unit vector along the part of its step that is tangent to it.

    exp_u(t) = cos(|t|) u + sin(|t|) t / |t|, t = s - (s u) u. A step of 0 stays; so does its
    gradient finite. From a zero row the step itself is the tangent: give the length back after.

    Args:
        units: [B, d], length 1 (or 0).
        steps: [B, d], radians.

    Returns:
        [B, d], length 1 where ``units`` has it.
    """
    moved: Tensor = _StepAlong.apply(units, steps)  # type: ignore[no-untyped-call]
    return moved


class _KeepLength(torch.autograd.Function):
    """y = (|l| / |v|) v: dv = (|l| / |v|) (g - (g v / |v|^2) v), dl = (g v / |v|) l / |l|."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, like: Tensor) -> Tensor:
        own, wanted = _lengths(vectors), _lengths(like)
        scale = torch.where(own > 0, wanted / own, 0.0)
        ctx.save_for_backward(vectors, like, own, wanted, scale)
        return vectors * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        vectors, like, own, wanted, scale = ctx.saved_tensors
        inverse = torch.where(own > 0, 1 / own, 0.0)
        along = _dots(grad, vectors) * inverse
        of_vectors = of_like = None
        if ctx.needs_input_grad[0]:
            of_vectors = grad * scale
            of_vectors.addcmul_(vectors, -scale * along * inverse)
            of_vectors = of_vectors.to(vectors.dtype)
        if ctx.needs_input_grad[1]:
            share = torch.where(wanted > 0, along / wanted, 0.0)
            of_like = (like * share).sum_to_size(like.shape).to(like.dtype)
        return of_vectors, of_like


class _SquaredAngles(torch.autograd.Function):
    """t^2: d t^2 / dx = -2 (t / sin t) (y / |y| - cos t x / |x|) / |x|.

    What rounding leaves of it along x is taken away: Adam would make a drift of the least of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        shares = [1 / _lengths(value).clamp(min=SHORTEST) for value in (x, y)]
        differences = x * shares[0]
        differences.addcmul_(y, shares[1], value=-1)
        apart = _lengths(differences)
        together = _lengths(differences.addcmul_(y, shares[1], value=2))
        angles = 2 * torch.atan2(apart, together)
        ctx.save_for_backward(x, y, *shares, angles)
        return angles.square().squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y, of_x, of_y, angles = ctx.saved_tensors
        sinc = torch.sinc(angles / math.pi).clamp(min=OPPOSITE)
        scale = 2 * grad[:, None] / sinc
        both = -scale * of_x * of_y
        own = scale * angles.cos()
        found: list[Tensor | None] = []
        sides = ((x, y, of_x), (y, x, of_y))
        for (one, other, share), needed in zip(sides, ctx.needs_input_grad, strict=True):
            if not needed:
                found.append(None)
                continue
            side = (one * (own * share.square())).addcmul_(other, both)
            along = _dots(side, one) * share * share
            found.append(side.addcmul_(one, along, value=-1))
        return found[0], found[1]


class _StepAlong(torch.autograd.Function):
    """y = C u + S t, C = cos |t|, S = sin |t| / |t|, where |u| = 1 (or u = 0).

    dt = S g + k t, k = (C - S) / |t|^2 (g t) - S (g u); ds = dt - (dt u) u, t u = 0;
    du = C g - (s u) dt - (dt u) s.
    """

    @staticmethod
    def forward(ctx: Any, units: Tensor, steps: Tensor) -> Tensor:
        inner = _dots(steps, units)
        tangent = torch.addcmul(steps, units, inner, value=-1)
        length = _lengths(tangent).clamp(min=SMALLEST**0.5)
        ctx.save_for_backward(units, steps, tangent, inner, length)
        return (units * length.cos()).addcmul_(tangent, length.sin() / length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        units, steps, tangent, inner, length = ctx.saved_tensors
        cosine, sinc = length.cos(), length.sin() / length
        along = sinc * _dots(grad, units)
        share = (cosine - sinc) / length.square() * _dots(grad, tangent) - along
        of_tangent = (grad * sinc).addcmul_(tangent, share)
        of_units = of_steps = None
        if ctx.needs_input_grad[0]:
            of_units = (grad * cosine).addcmul_(of_tangent, inner, value=-1)
            of_units.addcmul_(steps, along, value=-1)
        if ctx.needs_input_grad[1]:
            of_steps = of_tangent.addcmul_(units, along, value=-1)
        return of_units, of_steps


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """[B, d] and [B, d] -> [B, 1]."""
    return (a * b).sum(-1, keepdim=True)


def _lengths(rows: Tensor) -> Tensor:
    """[B, d] -> [B, 1], at least float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)
    return lengths
