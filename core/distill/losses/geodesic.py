"""Mean squared angle between the student's and the teacher's vectors, in rad^2."""

from __future__ import annotations

from torch import Tensor

from core.distill.losses._base import Batch, Loss


def geodesic(batch: Batch) -> Tensor:
    """Average the squared angles; zero if and only if every direction agrees."""
    return batch.angles.mean()


LOSS = Loss(compute=geodesic)
