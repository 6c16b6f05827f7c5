"""Relative distances inside the batch: Park et al. 2019."""

from __future__ import annotations

from torch import Tensor

from core.distill import relational
from core.distill.losses._base import Batch, Loss
from core.distill.losses._nested import nested


def rkd_distance(batch: Batch) -> Tensor:
    """Huber loss; see ``relational.rkd_distance``."""
    return nested(batch, relational.rkd_distance)


LOSS = Loss(compute=rkd_distance)
