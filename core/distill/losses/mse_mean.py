"""Squared difference of student and teacher, averaged over rows and width: document 001's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from core.distill.losses._base import Batch, Loss


def mse_mean(batch: Batch) -> Tensor:
    """Mean of (s - t)^2 over rows and width."""
    return functional.mse_loss(batch.student, batch.teacher)


LOSS = Loss(compute=mse_mean, needs_lengths=True)
