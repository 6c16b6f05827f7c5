"""Which head and which SwiGLU neuron of the student is which of the teacher's: Hungarian matching.

Document 002, section 5. Orders say ``new[i] = old[order[i]]``: what is called i afterwards is what
resembles the teacher's i. Nothing that the model computes changes by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.transport.moments import HeadMoments, NeuronMoments
from core.transport.permutations import LayerPermutation

ROUNDING = 1e-9
"""A likeness that falls by less did not fall."""
STAYS = 1e-9
"""Added where a thing would stay at its place: of equal choices the one that moves less."""
Matrix = NDArray[np.float64]


def correlations(of: NeuronMoments) -> Tensor:
    """Return the correlation of every neuron with every one of the teacher's, [M_s, M_t] float64.

    0 where either never changes. The sign counts: a SwiGLU's activations are signed, and an order
    cannot turn one round.

    Raises:
        DataInvalid: shapes do not fit together, no token counts, or a number is not finite.
    """
    M_s, M_t = len(of.sum_x), len(of.sum_y)
    if of.xx.shape != (M_s,) or of.yy.shape != (M_t,) or of.xy.shape != (M_s, M_t):
        raise DataInvalid("statistics of neurons: the shapes of sums and products do not fit")
    n = float(of.n)
    _check_finite("neurons", of.sum_x, of.sum_y, of.xx, of.yy, of.xy)
    if not n > 0:
        raise DataInvalid(f"statistics of neurons: no token counts (n is {n:g})")
    x, y = of.sum_x.double(), of.sum_y.double()
    centred = of.xy.double() - torch.outer(x, y) / n
    return centred * _inverse_spread(of.xx, x, n)[:, None] * _inverse_spread(of.yy, y, n)


def _inverse_spread(squares: Tensor, sums: Tensor, n: float) -> Tensor:
    squares = squares.double()
    spread = squares - sums * sums / n
    # What is left of a constant is rounding of its square.
    alive = spread > 1e-12 * squares
    return torch.where(alive, spread.clamp(min=1e-300).rsqrt(), torch.zeros_like(spread))


def resemblance(of: HeadMoments) -> Tensor:
    """Return the cosine of every head's maps with every one of the teacher's, [H_s, H_t] float64.

    Raises:
        DataInvalid: shapes do not fit together, or a number is not finite.
    """
    if of.xy.shape != (len(of.xx), len(of.yy)):
        raise DataInvalid("statistics of heads: the shapes of products do not fit")
    _check_finite("heads", of.xx, of.yy, of.xy)
    lengths = torch.outer(of.xx.double(), of.yy.double()).clamp(min=0).sqrt()
    cosines = of.xy.double() / lengths.clamp(min=1e-300)
    return torch.where(lengths > 0, cosines, torch.zeros_like(cosines))


def _check_finite(what: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataInvalid(f"statistics of {what}: a number is not finite")


def match(similarity: Tensor) -> tuple[int, ...]:
    """Return the order with the largest sum of similarities (Kuhn 1955).

    Args:
        similarity: [n, n]: rows the student's, columns the teacher's.
    """
    return tuple(_assign(_array(similarity)))


def _array(similarity: Tensor) -> Matrix:
    found: Matrix = similarity.double().cpu().numpy()
    return found


def _assign(similarity: Matrix) -> list[int]:
    preferred = similarity + STAYS * np.eye(len(similarity))
    # Rows are the teacher's here, so columns come in the order in which the teacher has them.
    _, columns = linear_sum_assignment(preferred.T, maximize=True)
    return [int(at) for at in columns]


def match_neurons(of: NeuronMoments) -> tuple[int, ...]:
    """Return the order of neurons [M] whose activations correlate most with the teacher's."""
    return match(correlations(of))


def match_heads(similarity: Tensor, kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return orders of KV heads and of query heads, whole KV groups staying together.

    A group's resemblance to one of the teacher's is what the best order of the query heads inside
    it reaches; groups are matched by these, so no other order that keeps groups has a larger sum.

    Args:
        similarity: [H, H]: rows the student's query heads, columns the teacher's.
        kv_heads: of both.

    Returns:
        [kv_heads] and [H], as in ``LayerPermutation``.
    """
    whole = _array(similarity)
    per_group = len(whole) // kv_heads
    inner: dict[tuple[int, int], list[int]] = {}
    score = np.zeros((kv_heads, kv_heads))
    for mine in range(kv_heads):
        for theirs in range(kv_heads):
            rows = slice(mine * per_group, (mine + 1) * per_group)
            block = whole[rows, theirs * per_group : (theirs + 1) * per_group]
            order = _assign(block)
            inner[mine, theirs] = order
            score[mine, theirs] = block[order, range(per_group)].sum()
    groups = _assign(score)
    heads = [
        mine * per_group + at for theirs, mine in enumerate(groups) for at in inner[mine, theirs]
    ]
    return tuple(groups), tuple(heads)


@dataclass(frozen=True)
class LayerSums:
    """What is known of one layer of the student and the teacher's beside it; None: not kept."""

    neurons: NeuronMoments | None = None
    heads: HeadMoments | None = None


def match_layer(
    layer: int,
    sums: LayerSums,
    *,
    student: ModelShape,
    teacher: ModelShape,
    held_out: LayerSums | None = None,
) -> tuple[LayerPermutation, dict[str, Any]]:
    """Match what can be matched of one layer.

    Args:
        layer: of the student.
        sums: over training texts.
        student: whose layer is reordered.
        teacher: whose order is wanted.
        held_out: over other texts. The order is the best one on the texts it was found on, so only
            here can it be seen to hurt.

    Returns:
        The order, and JSON values: by ``neurons`` and ``heads`` the mean similarity ``before`` and
        ``after`` (also ``held_out_``), how many ``moved``, whether it ``hurt``, or why it was
        ``skipped``.
    """
    told: dict[str, Any] = {"layer": layer}
    neurons = kv_heads = heads = None
    other = held_out or LayerSums()
    reason = _uneven("neurons", student.neurons, teacher.neurons)
    if sums.neurons is None or reason:
        told["neurons"] = {"skipped": reason or "no statistics were kept"}
    else:
        similarity = correlations(sums.neurons)
        neurons = match(similarity)
        told["neurons"] = _figures(neurons, similarity, other.neurons, correlations)
    reason = _uneven("query heads", student.heads, teacher.heads)
    reason = reason or _uneven("KV heads", student.kv_heads, teacher.kv_heads)
    if sums.heads is None or reason:
        told["heads"] = {"skipped": reason or "no statistics were kept"}
    else:
        similarity = resemblance(sums.heads)
        kv_heads, heads = match_heads(similarity, student.kv_heads)
        told["heads"] = _figures(heads, similarity, other.heads, resemblance)
    return LayerPermutation(layer, kv_heads, heads, neurons), told


def _uneven(what: str, mine: int, theirs: int) -> str | None:
    if mine == theirs:
        return None
    return f"the student has {mine} {what}, the teacher {theirs}: no order makes them equal"


def _figures(
    order: tuple[int, ...], similarity: Tensor, held_out: Any, measure: Callable[[Any], Tensor]
) -> dict[str, Any]:
    before, after = _means(order, similarity)
    told: dict[str, Any] = {
        "before": before,
        "after": after,
        "moved": sum(at != place for place, at in enumerate(order)),
        "hurt": after < before - ROUNDING,
        "skipped": None,
    }
    if held_out is not None:
        before, after = _means(order, measure(held_out))
        told |= {
            "held_out_before": before,
            "held_out_after": after,
            "hurt": after < before - ROUNDING,
        }
    return told


def _means(order: tuple[int, ...], similarity: Tensor) -> tuple[float, float]:
    """Mean similarity of what stands at equal places, before and after."""
    columns = torch.arange(len(order), device=similarity.device)
    rows = torch.tensor(order, device=similarity.device)
    return float(similarity.diagonal().mean()), float(similarity[rows, columns].mean())
