"""The product of many small rotations, forward then reversed, with its gradient by hand.

x prod_c exp(w_c L_c / 2), c = 1..C then C..1: a Strang splitting of exp(sum_c w_c L_c), exact to
third order in the commutators. The gradient keeps only each factor's coordinates ([B, 2m]) and
runs the factors backwards, since a rotation is undone by its transpose: autograd over 2 C small
steps takes three times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SPARSE = 0.5
"""Share of zero weights from which rows are gathered (an exact router has 19 of 20)."""


def strang_product(x: Tensor, weights: Tensor, bases: Tensor, angles: Tensor) -> Tensor:
    """Rotate each row by its own weights' product; differentiable once in every argument.

    Args:
        x: [B, d].
        weights: [B, C].
        bases: [C, d, 2m], orthonormal columns, the planes' first vectors before their second.
        angles: [C, m] radians at weight 1.

    Returns:
        [B, d].
    """
    asked = any(tensor.requires_grad for tensor in (x, weights, bases, angles))
    # Under autocast too in the planes' own dtype: rounding would add up over 2 C factors.
    with torch.autocast(x.device.type, enabled=False):
        x, weights = x.to(bases.dtype), weights.to(bases.dtype)
        if torch.is_grad_enabled() and asked:
            result: Tensor = _Product.apply(x, weights, bases, angles)  # type: ignore[no-untyped-call]
            return result
        if (weights == 0).float().mean() > SPARSE:
            return _run_sparse(x, weights, bases, angles)
        return _run(x, *_turns(weights, angles), bases, None)


def _order(clusters: int) -> list[int]:
    return [*range(clusters), *reversed(range(clusters))]


def _turns(weights: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos - 1 (without cancellation) and sin of every half turn: [C, B, m] each."""
    half = weights.T[:, :, None] * (angles / 2)[:, None, :]
    return -2 * (half / 2).sin().square(), half.sin()


def _change(coordinates: Tensor, versine: Tensor, sine: Tensor) -> Tensor:
    """What a rotation adds to [B, 2m] coordinates."""
    along, across = coordinates.chunk(2, dim=1)
    return torch.cat([along * versine - across * sine, along * sine + across * versine], dim=1)


def _run(
    x: Tensor, versine: Tensor, sine: Tensor, bases: Tensor, kept: list[Tensor] | None
) -> Tensor:
    x = x.clone()
    for c in _order(len(bases)):
        coordinates = x @ bases[c]  # [B, 2m]
        if kept is not None:
            kept.append(coordinates)
        x.addmm_(_change(coordinates, versine[c], sine[c]), bases[c].T)
    return x


def _run_sparse(x: Tensor, weights: Tensor, bases: Tensor, angles: Tensor) -> Tensor:
    """Turn in each factor only the rows that weigh it: the others would not move."""
    x = x.clone()
    active = [column.nonzero().flatten() for column in weights.unbind(1)]
    for c in _order(len(bases)):
        rows = active[c]
        if not len(rows):
            continue
        versine, sine = _turns(weights[rows, c, None], angles[c, None])
        part = x[rows]
        part.addmm_(_change(part @ bases[c], versine[0], sine[0]), bases[c].T)
        x[rows] = part
    return x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bases: Tensor, angles: Tensor) -> Tensor:
        versine, sine = _turns(weights, angles)
        kept: list[Tensor] = []
        result = _run(x, versine, sine, bases, kept)
        ctx.save_for_backward(result, weights, bases, angles, versine, sine, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, bases, angles, versine, sine, *kept = ctx.saved_tensors
        x, grad = x.clone(), grads[0].clone()
        by_turn = torch.zeros_like(versine)  # [C, B, m]
        by_base = torch.zeros_like(bases) if ctx.needs_input_grad[2] else None
        for c, coordinates in zip(_order(len(bases)), reversed(kept), strict=True):
            asked = grad @ bases[c]  # [B, 2m]
            by_turn[c] += _turn_grad(coordinates, asked, versine[c], sine[c])
            back = _change(asked, versine[c], -sine[c])  # the transpose turns the other way
            if by_base is not None:
                change = _change(coordinates, versine[c], sine[c])
                x.addmm_(change, bases[c].T, alpha=-1)  # what went into the factor
                by_base[c].addmm_(x.T, back).addmm_(grad.T, change)
            grad.addmm_(back, bases[c].T)
        by_weight = (by_turn * (angles / 2)[:, None, :]).sum(2).T
        by_angle = torch.einsum("cbm,bc->cm", by_turn, weights) / 2
        return grad, by_weight, by_base, by_angle


def _turn_grad(coordinates: Tensor, asked: Tensor, versine: Tensor, sine: Tensor) -> Tensor:
    """Gradient of each angle: [B, m]."""
    along, across = coordinates.chunk(2, dim=1)
    first, second = asked.chunk(2, dim=1)
    inner = first * along + second * across
    outer = second * along - first * across
    return outer * (versine + 1) - inner * sine
