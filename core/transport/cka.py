"""Which layer of the teacher resembles each of the student's: linear CKA, and the best path."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def cka(
    student_states: Mapping[int, Tensor], teacher_states: Mapping[int, Tensor]
) -> tuple[Tensor, tuple[int, ...]]:
    """Compare all pairs of layers by linear CKA, and map the student's along the best path.

    ``CKA(X, Y) = |Y^T X|^2 / (|X^T X| |Y^T Y|)``, Frobenius norms of centred columns (Kornblith
    et al. 2019, section 3, equation 3), computed by the Gram matrices ``X X^T``: in [0, 1], and the
    same after any rotation or scaling of either side. With no more rows than dimensions it is high
    for all layers, so more rows than the wider model is wide tell more. The map never falls in
    depth and has the largest sum; of equal ones, that with the shallower layers.

    Holds ``8 n^2 (L_s + 1)`` bytes.

    Args:
        student_states: of each layer 0 .. L_s - 1, [n, d_s], any float dtype.
        teacher_states: of each layer 0 .. L_t - 1, [n, d_t], the same n >= 2 tokens.

    Returns:
        [L_s, L_t] float64 (0 where all rows of a layer are equal), and the map, [L_s].
    """
    _check_states(student_states, teacher_states)
    student = [_gram(student_states[layer]) for layer in range(len(student_states))]
    matrix = torch.empty(len(student), len(teacher_states), dtype=torch.float64)
    for other in range(len(teacher_states)):
        gram = _gram(teacher_states[other])
        for layer, own in enumerate(student):
            matrix[layer, other] = torch.dot(own, gram)
    return matrix.clamp_(0.0, 1.0), _best_path(matrix)


def _check_states(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> None:
    rows = {len(states) for of in (student, teacher) for states in of.values()}
    whole = all(of and set(of) == set(range(len(of))) for of in (student, teacher))
    if not whole or len(rows) != 1 or rows.pop() < 2:
        raise ValueError("states: needed each layer from 0, all of the same two rows or more")


def _gram(states: Tensor) -> Tensor:
    """Return the centred Gram matrix, flat [n n] float64 of norm 1, or zeros."""
    wide = states.double()
    wide = wide - wide.mean(0)
    gram = (wide @ wide.mT).flatten()
    norm = torch.linalg.vector_norm(gram)
    # What rounding leaves of equal rows is no direction.
    least = states.double().square().sum() * 1e-24
    return gram / norm if norm > least else torch.zeros_like(gram)


def _best_path(matrix: Tensor) -> tuple[int, ...]:
    """Return for each row a column, never falling, of the largest sum."""
    totals = [matrix[0]]
    for row in matrix[1:]:
        totals.append(row + totals[-1].cummax(0).values)
    columns: list[int] = []
    stop = matrix.shape[1]
    for total in reversed(totals):
        columns.append(int(total[:stop].argmax()))  # the first of equal ones
        stop = columns[-1] + 1
    return tuple(reversed(columns))
