"""Angles that three rows of the batch make: Park et al. 2019."""

from __future__ import annotations

from torch import Tensor

from core.distill import relational
from core.distill.losses._base import Batch, Loss
from core.distill.losses._nested import nested


def rkd_angle(batch: Batch) -> Tensor:
    """Huber loss; see ``relational.rkd_angle``."""
    return nested(batch, relational.rkd_angle)


LOSS = Loss(compute=rkd_angle)
