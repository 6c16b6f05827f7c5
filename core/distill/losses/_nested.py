"""A relation between rows, held against the teacher's for every nested code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from core.distill.losses._base import Batch


def nested(batch: Batch, relation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum a relation of codes [B, k'] to the teacher's [B, D] by the codes' weights.

    A batch of one row, as an epoch's last may be, has no relations: 0.
    """
    if len(batch.teacher) < 2:
        return batch.student.sum() * 0.0
    terms = [weight * relation(codes, batch.teacher) for codes, weight in batch.codes()]
    return torch.stack(terms).sum()
