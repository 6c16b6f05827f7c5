"""1 - cosine between what a decoder makes of the codes and the teacher's embedding."""

from __future__ import annotations

from torch import Tensor

from core.distill.losses._base import Batch, Loss
from core.rotations.sphere import unit


def reconstruction(batch: Batch) -> Tensor:
    """Half the mean squared chord to the embedding, in [0, 2]."""
    if batch.decoded is None:
        raise ValueError("reconstruction needs decoded vectors")
    chord = unit(batch.decoded) - unit(batch.teacher)
    return chord.square().sum(1).mean() / 2


LOSS = Loss(compute=reconstruction)
