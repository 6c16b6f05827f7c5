"""Whether the student would retrieve what the teacher retrieves, among the batch's targets."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from core.distill.losses._base import Batch, Loss
from core.rotations.sphere import unit

TEMPERATURE = 0.05
"""Of the cosines."""


def retrieval_kl(batch: Batch) -> Tensor:
    """KL(teacher || student) over the candidates, in nats, averaged; zero if and only if equal."""
    if batch.candidates is None:
        raise ValueError("retrieval_kl needs candidates")
    student = _log_probabilities(batch.student, batch.candidates)
    teacher = _log_probabilities(batch.teacher, batch.candidates)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _log_probabilities(vectors: Tensor, candidates: Tensor) -> Tensor:
    """[B, M] log softmax of the cosines over the temperature."""
    cosines = unit(vectors) @ unit(candidates).T
    return functional.log_softmax(cosines / TEMPERATURE, dim=-1)


LOSS = Loss(compute=retrieval_kl, needs_candidates=True)
