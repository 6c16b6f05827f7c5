"""Mean squared angle of the worst 5 %: the conditional value at risk."""

from __future__ import annotations

import math

from torch import Tensor

from core.distill.losses._base import Batch, Loss

TAIL = 0.05


def cvar(batch: Batch) -> Tensor:
    """Average the largest squared angles, at least one, in rad^2 (Rockafellar and Uryasev 2000)."""
    angles = batch.angles
    worst = angles.topk(math.ceil(TAIL * len(angles))).values
    return worst.mean()


LOSS = Loss(compute=cvar)
