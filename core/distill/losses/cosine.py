"""1 - cosine between student and teacher, averaged: document 001's other half."""

from __future__ import annotations

from torch import Tensor

from core.distill.losses._base import Batch, Loss
from core.rotations.sphere import unit


def cosine(batch: Batch) -> Tensor:
    """Half the mean squared chord |s/|s| - t/|t||^2, which keeps its digits near 0; in [0, 2]."""
    chord = unit(batch.student) - unit(batch.teacher)
    return chord.square().sum(1).mean() / 2


LOSS = Loss(compute=cosine)
