"""KL between the in-batch similarity distributions of teacher and student: document 004."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from core.distill import relational
from core.distill.losses._base import Batch, Loss
from core.distill.losses._nested import nested


def relational_kl(batch: Batch) -> Tensor:
    """In nats, times tau^2; see ``relational.relational_kl``."""
    return nested(batch, partial(relational.relational_kl, tau=batch.tau))


LOSS = Loss(compute=relational_kl)
