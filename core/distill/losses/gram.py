"""Cosines inside the batch, student against teacher."""

from __future__ import annotations

from torch import Tensor

from core.distill import relational
from core.distill.losses._base import Batch, Loss
from core.distill.losses._nested import nested


def gram(batch: Batch) -> Tensor:
    """Mean squared difference; see ``relational.gram``."""
    return nested(batch, relational.gram)


LOSS = Loss(compute=gram)
