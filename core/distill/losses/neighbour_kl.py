"""KL between who is near whom in the batch, teacher and student: codes that keep neighbours."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from core.distill import relational
from core.distill.losses._base import Batch, Loss
from core.distill.losses._nested import nested


def neighbour_kl(batch: Batch) -> Tensor:
    """In nats, times tau^2; see ``relational.neighbour_kl``."""
    return nested(batch, partial(relational.neighbour_kl, tau=batch.tau))


LOSS = Loss(compute=neighbour_kl)
