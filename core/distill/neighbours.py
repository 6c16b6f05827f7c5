"""Whether low-dimensional codes keep who is near whom: recall and trustworthiness. Blocked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NEAREST = 10
BLOCK_ENTRIES = 4 * 2**20
"""Entries of a distance matrix in memory at a time."""


def nearest_rows(points: Tensor, among: Tensor, *, count: int, own: Tensor | None) -> Tensor:
    """Return the rows of ``among`` nearest by Euclidean distance: [Q, count] int64, nearest first.

    Args:
        points: [Q, k] float64: the square of what is far from the origin cancels.
        among: [n, k] float64.
        count: 1 to n, less one where ``own`` is given.
        own: [Q] int64, the row of ``among`` that is the point itself and never found; or None.
    """
    found = []
    squares = among.square().sum(1)
    rows = max(1, BLOCK_ENTRIES // max(1, len(among)))
    for start in range(0, len(points), rows):
        block = points[start : start + rows]
        apart = squares - 2 * block @ among.T  # |p|^2 is the same along a row
        if own is not None:
            some = own[start : start + rows, None]
            apart.scatter_(1, some, torch.inf)
        found.append(apart.topk(count, dim=1, largest=False).indices)
    return torch.cat(found)


def recall(codes: Tensor, teacher: Tensor, *, count: int = NEAREST) -> float:
    """Share of each row's ``count`` nearest by the teacher that are its nearest by the codes too.

    Args:
        codes: [n, k], compared by Euclidean distance.
        teacher: [n, D], compared by cosine.
        count: fewer where there are fewer other rows.
    """
    return recall_among(codes, codes, teacher, teacher, torch.arange(len(codes)), count=count)


def recall_among(
    codes: Tensor,
    all_codes: Tensor,
    teacher: Tensor,
    all_teacher: Tensor,
    own: Tensor,
    *,
    count: int = NEAREST,
) -> float:
    """Recall of some rows' neighbours among all.

    Args:
        codes: [Q, k].
        all_codes: [n, k].
        teacher: [Q, D].
        all_teacher: [n, D].
        own: [Q] int64, where each stands among all.
        count: fewer where there are fewer other rows.
    """
    count = min(count, len(all_codes) - 1)
    if not count:
        return 1.0
    at = own.to(codes.device)
    units, all_units = (
        functional.normalize(rows.double(), dim=1) for rows in (teacher, all_teacher)
    )
    wanted = nearest_rows(units, all_units, count=count, own=at)
    found = nearest_rows(codes.double(), all_codes.double(), count=count, own=at)
    hits = (found[:, :, None] == wanted[:, None, :]).any(dim=2)
    return float(hits.double().mean())
